"""Put adapters of any kinds into a checkpoint, or take them out again."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hubtool.actions.collapse import Collapsed, Options, collapse
from hubtool.cli import output
from hubtool.cli.amounts import human_size
from hubtool.cli.context import State, dry_run_option, force_option, json_option, pass_state
from hubtool.errors import UsageProblem
from hubtool.ops.recipe import Input

if TYPE_CHECKING:
    from hubtool.ops.collapse.checking import Verdict

_MOST = 8  # of a list that may have an entry for every module
_CHECKED = 16  # tensors that --check computes again


@click.command(
    epilog="""\b
Examples:
  hubtool collapse model.safetensors style.safetensors=0.8 -o styled.safetensors
  hubtool collapse model/ style.safetensors=0.8 detail.safetensors=0.5 -o styled/
  hubtool collapse model.safetensors style.safetensors --strength unet=0.5,text_encoder=0 -o styled.safetensors
  hubtool collapse model.safetensors style.safetensors -o styled.safetensors --check
  hubtool collapse styled.safetensors --undo -o model-again.safetensors --compare model.safetensors
"""
)
@click.argument("base")
@click.argument("adapters", nargs=-1, metavar="ADAPTER[=STRENGTH]...")
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Output file or folder.")
@click.option(
    "--strength",
    "strengths",
    multiple=True,
    help="By component or module: unet=0.5,text_encoder=0 or unet:down_blocks.*=0.3.",
)
@click.option("--blocks", help="Block weights: a list of numbers (12, 17, 19, 20, 25, 26 ...) or a preset.")
@click.option("--family", help="Family of both, where a file cannot tell.")
@click.option(
    "--format", "container", type=click.Choice(["safetensors", "torch-zip"]), help="Container; default: by suffix."
)
@click.option("--skip-mismatched", "allow_mismatch", is_flag=True, help="Leave modules out that do not fit the base.")
@click.option("--check", is_flag=True, help=f"Compute {_CHECKED} changed tensors again in fp64 and compare.")
@click.option(
    "--undo", is_flag=True, help="BASE is a result: take the adapters (by default those of its recipe) out of it."
)
@click.option("--compare", type=click.Path(path_type=Path), help="Count the values that differ from this checkpoint's.")
@click.option(
    "--search", multiple=True, type=click.Path(path_type=Path), help="Folder with adapters that a kept recipe names."
)
@click.option(
    "--hash-inputs", "hashes", is_flag=True, help="Put the SHA-256 of inputs above 1 GiB into the recipe, too."
)
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu or cuda.")
@click.option("--workers", type=click.IntRange(1), help="Threads; default: one a processor.")
@force_option
@dry_run_option
@json_option
@pass_state
def command(state: State, /, base: str, adapters: tuple[str, ...], out: Path | None, **asked: Any) -> None:
    """Collapse adapters into BASE: a checkpoint file or a diffusers folder, written again in its own container and layout.

    All changes are summed in fp32 and rounded once; untouched tensors are copied as bytes. An adapter that matches nothing is an error.
    """
    inputs = [named(text, asked["strengths"], asked["blocks"]) for text in adapters]
    names = (
        "family",
        "container",
        "allow_mismatch",
        "undo",
        "compare",
        "search",
        "hashes",
        "force",
        "dry_run",
        "device",
        "workers",
    )
    options = Options(
        **{name: asked[name] for name in names}, check=_CHECKED if asked["check"] else 0, library=state.library
    )
    if out is not None and not options.dry_run:
        out.parent.mkdir(parents=True, exist_ok=True)
    with output.progress(f"collapsing into {Path(base).name}", _size(Path(base))) as advance:
        done = collapse(base, inputs, out, options, advance)
    if asked["as_json"]:
        output.print_json(done.to_json())
    else:
        _describe(done)
    if not done.passed:
        raise click.exceptions.Exit(1)


def _size(base: Path) -> int | None:
    """About what will be written; None for a REF."""
    if base.is_dir():
        return sum(path.stat().st_size for path in base.rglob("*.safetensors")) or None
    return base.stat().st_size if base.is_file() else None


def named(text: str, strengths: Sequence[str] = (), blocks: str | None = None) -> Input:
    """``ADAPTER[=STRENGTH]`` as an input. A file whose own name ends in ``=number`` is that file."""
    path, equals, number = text.rpartition("=")
    if not equals or os.path.lexists(text):
        return Input(path=text, strengths=tuple(strengths), blocks=blocks, role="adapter")
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise UsageProblem(f"{number!r} is no strength", hint=f"{path}=0.8")
    return Input(path=path, strength=strength, strengths=tuple(strengths), blocks=blocks, role="adapter")


def _describe(done: Collapsed) -> None:
    plan, report = done.plan, done.report
    output.show(f"{plan.source} -> {done.output or '(dry run)'}")
    counts = f"{len(report.shares)} tensors computed, {report.tensors - len(report.shares)} copied"
    output.show(f"  {plan.format}, layout {plan.layout or '-'}, {counts}, {human_size(done.size)}")
    output.details(_lines(done), done.warning)


def _lines(done: Collapsed) -> Iterator[str]:
    for one in done.report.accounts:
        yield str(one)
        yield from _first([f"unmatched: {name}" for name in one.unmatched], "unmatched")
        yield from _first([f"mismatched: {name}: {why}" for name, why in one.mismatched.items()], "mismatched")
    yield from (f"rounded: {what}: {why}" for what, why in done.plan.rounded.items())
    yield from _first([f"note: {note}" for note in done.plan.notes], "note")
    yield from _checks(done)


def _checks(done: Collapsed) -> Iterator[str]:
    if done.verdict is not None:
        yield from _verdict(done.verdict)
    if done.compared is not None:
        differing = sum(done.compared.differing.values())
        yield f"compare: {differing} of {done.compared.values} values differ, in {len(done.compared.differing)} of {done.compared.tensors} tensors, worst relative error {done.compared.worst:.3g}"
        yield from _first(
            [f"differs: {key}: {count} values" for key, count in done.compared.differing.items()], "differs"
        )
    if done.restored is not None:
        yield (
            "the very bytes that the recipe remembers"
            if done.restored
            else "not the very bytes that the recipe remembers: rounding is not undone"
        )


def _verdict(found: Verdict) -> Iterator[str]:
    worst = max((one.worst for one in found.modules), default=0.0)
    differing, values = (sum(getattr(one, what) for one in found.modules) for what in ("differing", "values"))
    kept = f"{found.copied - len(found.altered)} of {found.copied} copied tensors have the base's bytes"
    yield f"check: {'passed' if found.passed else 'FAILED'}: {len(found.modules)} tensors computed again in fp64, {kept}"
    yield f"check: {differing} of {values} values differ from that sum rounded once, by {worst:.3g} of the tensor's largest value at most"


def _first(lines: list[str], what: str) -> list[str]:
    left = len(lines) - _MOST
    return lines if left <= 0 else [*lines[:_MOST], f"{what}: {left} more"]
