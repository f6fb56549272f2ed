"""Merge adapters, or checkpoints, into one: by a recipe, by strengths of components and blocks, by any of twenty methods."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from hubtool.actions.merge import Merged, Options, merge
from hubtool.actions.recipe import STEPS
from hubtool.cli import output
from hubtool.cli.amounts import human_size
from hubtool.cli.context import State, dry_run_option, force_option, json_option, pass_state
from hubtool.errors import UsageProblem
from hubtool.ops.factor_space.budget import Budget
from hubtool.ops.methods import Method
from hubtool.ops.recipe import Input
from hubtool.ops.target import SUFFIXES

_MOST = 5  # of a list that may have an entry for every module
_LIMITS = ("rank", "energy", "error", "across", "max_rank")
_SAME = (
    "method", "base", "space", "alpha", "layout", "container", "dtype", "family", "component", "seed", "steps", "hashes",
    "allow_loss", "force", "dry_run", "device", "workers",
)  # fmt: skip


@click.command(
    epilog="""\b
Examples:
  hubtool merge a.safetensors b.safetensors --strength 0.3 -o mixed.safetensors
  hubtool merge style.safetensors=0.8 detail.safetensors=0.5 --rank 32 -o both.safetensors
  hubtool merge a.safetensors b-folder/ --strength 0,unet=0.5 --method slerp -o mixed.safetensors
  hubtool merge a.safetensors b.safetensors --base sd15.safetensors --method ties --set density=0.3 -o mixed.safetensors
  hubtool merge a.safetensors b.safetensors --blocks 1,0,0,0,0.5,0.5,0.5,0.5,0,0,0,0.7 -o mixed.safetensors
  hubtool merge a.safetensors b.safetensors --steps 5 -o between/
  hubtool merge --recipe recipe.yaml -o mixed.safetensors
  hubtool merge --methods
"""
)
@click.argument("inputs", nargs=-1, metavar="FILE[=STRENGTH]...")
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Output file or folder.")
@click.option(
    "--recipe", type=click.Path(path_type=Path), help="Do what this recipe (JSON, YAML, or an earlier output) says."
)
@click.option("--method", help="How to merge; --methods lists them.  [default: the weighted sum]")
@click.option("--methods", "listing", is_flag=True, help="List the methods with their parameters.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A parameter of the method: density=0.3.")
@click.option("--base", help="What the inputs were made from, for methods that merge changes.")
@click.option(
    "--strength",
    "strengths",
    multiple=True,
    help="Of the inputs in their order, one for each or for all but the first: 0.3 or unet=0.5,text_encoder=0. "
    "Strengths of checkpoints are shares: what the others leave is the first's.",
)
@click.option(
    "--blocks", multiple=True, help="Block weights as --strength: numbers (12, 17, 19, 20, 25, 26 ...) or a preset."
)
@click.option("--rank", type=click.IntRange(1), help="Adapters: at most so many ranks a module.")
@click.option("--energy", type=float, help="Adapters: as few ranks as keep this share of ||dW||^2.")
@click.option("--error", type=float, help="Adapters: as few ranks as bring ||dW - out|| / ||dW|| down to this.")
@click.option("--across", is_flag=True, help="Adapters: reach --rank, --energy or --error over the whole file.")
@click.option("--budget", metavar="SIZE", help="Adapters: the best that fits into SIZE (80MB), over the whole file.")
@click.option("--max-rank", type=click.IntRange(1), help="Adapters: no module gets more.")
@click.option(
    "--space", type=click.Choice(["dense", "core", "knots"]), default="dense", show_default=True,
    help="Adapters: where TIES, DARE and their kin look at entries.",
)  # fmt: skip
@click.option("--alpha", type=float, help="Adapters: alpha of the output.  [default: its rank]")
@click.option("--layout", help="Layout of the output.  [default: that of the first input]")
@click.option(
    "--format", "container", type=click.Choice(sorted(set(SUFFIXES.values()))), help="Container; default: by suffix."
)
@click.option(
    "--dtype", help="fp16, bf16, fp32, of checkpoints fp8_e4m3 or fp8_e5m2.  [default: that of the first input]"
)
@click.option("--family", help="Family of the inputs, where they cannot tell.")
@click.option("--component", help="Adapters: only this component.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of methods that drop at random.")
@click.option(
    "--steps", type=click.IntRange(2), help="So many results from the first input to the second, in a folder."
)
@click.option(
    "--hash-inputs", "hashes", is_flag=True, help="Put the SHA-256 of inputs above 1 GiB into the recipe, too."
)
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu or cuda.")
@click.option("--workers", type=click.IntRange(1), help="Threads; default: one a processor.")
@click.option("--allow-loss", is_flag=True, help="Write even what the layout cannot hold in full.")
@force_option
@dry_run_option
@json_option
@pass_state
def command(state: State, /, inputs: tuple[str, ...], out: Path | None, **asked: Any) -> None:
    """Merge adapters into one adapter, or checkpoints into one checkpoint.

    Inputs may differ in container, layout, dtype and rank; the output is like the first. Everything is computed in fp32 and rounded once;
    equal inputs give equal bytes. The recipe is kept in the output.

    \b
    Where several adapters change the same module:
      LoRA, LoCon, Tucker, LoHa, LoKr  exact with one another, as factors; --rank truncates
      full, norm, bias, sparse         exact, summed whole (also beside factors); only by
                                       methods that are sums
      IA3                              exact with IA3 of the same axis and trainer
      DoRA, OFT, BOFT, GLoRA, set      refused: their change depends on the base
    A module that only one of them changes stays of its kind; those of the last row only at
    strength 1. Elsewhere: collapse the adapters into the base, then extract.
    """
    if asked["listing"]:
        _list_methods(asked["as_json"])
        return
    if out is None and not asked["dry_run"]:
        raise UsageProblem("no output is named", hint="give -o OUT, or --dry-run")
    if out is not None and not asked["dry_run"]:
        out.parent.mkdir(parents=True, exist_ok=True)
    if asked["recipe"] is not None:
        _by_recipe(state, asked["recipe"], inputs, out, asked)
        return
    named = [_named(text) for text in inputs]
    if len(named) + (asked["base"] is not None) < 2:
        raise UsageProblem("a merge takes at least two inputs")
    with output.progress("merging") as advance:
        done = merge(named, out, _options(state, asked), advance)
    _report(done, asked["as_json"])


def _options(state: State, asked: dict[str, Any]) -> Options:
    from hubtool.ops.extract.request import parse_size

    size = None if asked["budget"] is None else parse_size(asked["budget"])
    budget = Budget(size=size, **{name: asked[name] for name in _LIMITS})
    return Options(
        parameters=dict(map(_setting, asked["settings"])),
        strengths=asked["strengths"],
        blocks=asked["blocks"],
        budget=budget,
        library=state.library,
        **{name: asked[name] for name in _SAME},
    )


def _setting(text: str) -> tuple[str, float | bool | str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageProblem(f"{text!r} sets nothing", hint="--set density=0.3")
    if value.lower() in ("true", "false"):
        return name.strip().replace("-", "_"), value.lower() == "true"
    try:
        return name.strip().replace("-", "_"), float(value)
    except ValueError:
        raise UsageProblem(f"{value!r} is no number", hint="--set density=0.3") from None


def _named(text: str) -> Input:
    """``FILE[=STRENGTH]`` as an input. A file whose own name ends in ``=number`` is that file."""
    path, equals, number = text.rpartition("=")
    if not equals or os.path.lexists(text):
        return Input(path=text)
    try:
        return Input(path=path, strength=float(number))
    except ValueError:
        raise UsageProblem(f"{number!r} is no strength", hint=f"{path}=0.8") from None


def _by_recipe(state: State, source: Path, inputs: Sequence[str], out: Path | None, asked: dict[str, Any]) -> None:
    from hubtool.actions import recipe as actions

    if inputs:
        raise UsageProblem("the recipe names the inputs", hint="leave them out, or leave out --recipe")
    recipe, path = actions.read(source, state.library)
    if recipe.operation != "merge":
        raise UsageProblem(f"this is a recipe to {recipe.operation}", path=path, hint=f"hubtool recipe run {source}")
    same = {name: asked[name] for name in ("force", "dry_run", "device", "workers")}
    options = actions.RunOptions(**same, library=state.library, folder=path.resolve().parent)
    with output.progress(f"merging by {path.name}") as advance:
        done = actions.run(recipe, out, options, advance)
    _report([done.result], asked["as_json"])


def _list_methods(as_json: bool) -> None:
    from hubtool.ops.methods import known

    if as_json:
        output.print_json({"methods": [_document(one) for one in known().values()]})
        return
    for one in known().values():
        base = {"none": "", "optional": ", base optional", "required": ", base for checkpoints"}[one.base]
        low, high = one.inputs
        count = f"{low}" if low == high else f"{low} or more"
        output.show(f"{one.id}: {one.title} ({count}{base}; {one.source})")
        output.show(f"  {one.help}")
        for name, parameter in one.parameters.items():
            output.show(f"  --set {name}={parameter.default}: {parameter.help}")


def _document(one: Method) -> dict[str, Any]:
    return {
        "method": one.id,
        "title": one.title,
        "inputs": list(one.inputs),
        "base": one.base,
        "parameters": {name: {"default": own.default, "help": own.help} for name, own in one.parameters.items()},
        "help": one.help,
        "source": one.source,
    }


def _report(done: Sequence[Merged], as_json: bool) -> None:
    if as_json:
        documents = [one.to_json() for one in done]
        output.print_json(documents[0] if len(documents) == 1 else {"merged": documents})
        return
    for one in done:
        _describe(one)


def _describe(done: Merged) -> None:
    plan = done.plan
    names = ", ".join(map(_said, done.recipe.inputs))
    output.show(f"{names} -> {done.output or '(dry run)'}")
    size = human_size(done.size)
    output.show(
        f"  {done.recipe.method}, {plan.format}, layout {plan.layout or '-'}, {len(plan.tensors)} tensors, {size}"
    )
    output.details(_details(done), done.warning)


def _said(one: Input) -> str:
    """An input's path; of an intermediate result, whose folder is gone by now, only the name."""
    path = Path(str(one))
    return path.name if any(part.startswith(STEPS) for part in path.parts) else str(one)


def _details(done: Merged) -> Iterator[str]:
    from hubtool.ops.merge_checkpoints import Report

    report = done.report
    if isinstance(report, Report):
        for name in dict.fromkeys((*report.merged, *report.copied)):
            yield f"{name}: {report.merged[name]} tensors merged, {report.copied[name]} copied"
    else:
        yield f"{len(report.modules)} modules: {report.matched} of several inputs, {report.single} of one"
        if report.error is not None:
            yield f"error {report.error:.3g} of the change"
    yield from _first([f"loss: {loss.what}: {loss.reason}" for loss in done.plan.losses], "loss")
    yield from _first([f"rounded: {what}: {why}" for what, why in done.plan.rounded.items()], "rounded")
    yield from _first([f"note: {note}" for note in done.plan.notes], "note")


def _first(lines: list[str], what: str) -> list[str]:
    left = len(lines) - _MOST
    return lines if left <= 0 else [*lines[:_MOST], f"{what}: {left} more"]
