"""Convert between containers, key layouts, algorithms, embedding encodings and dtypes; mend broken keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from hubtool.actions.convert import Converted, Options, convert
from hubtool.actions.refs import locate
from hubtool.cli import output
from hubtool.cli.amounts import human_size
from hubtool.cli.context import State, dry_run_option, force_option, json_option, pass_state
from hubtool.errors import HubtoolError, PartialFailure, UsageProblem
from hubtool.ops.plan import Plan
from hubtool.ops.target import ALGORITHMS, SUFFIXES, Target

_EXTENSION = {"safetensors": ".safetensors", "torch-zip": ".pt", "peft-folder": "", "diffusers-folder": ""}
_MOST = 8  # of a list that may have an entry for every module


@click.command(
    epilog="""\b
Examples:
  hubtool convert style.safetensors -o out.safetensors --layout diffusers
  hubtool convert out.safetensors -o back.safetensors --layout kohya
  hubtool convert model.ckpt -o model.safetensors
  hubtool convert *.pt --out-dir safe/ --format safetensors
  hubtool convert style.safetensors --layout kohya/diffusers --dry-run
  hubtool convert loha.safetensors -o lora.safetensors --layout diffusers --as lora
  hubtool convert broken.safetensors -o good.safetensors --repair
  hubtool convert good.safetensors -o broken.safetensors --layout origin
  hubtool convert model.safetensors -o model/ --layout diffusers
  hubtool convert model/ -o model.safetensors --layout single-file
  hubtool convert 3f9a1c -o style.safetensors --layout kohya
"""
)
@click.argument("sources", nargs=-1, required=True)
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Output file (one source).")
@click.option("--out-dir", type=click.Path(path_type=Path, file_okay=False), help="Folder for the outputs.")
@click.option(
    "--layout",
    help="Key layout (kohya, diffusers, comfy, peft ...), embedding encoding (a1111, kohya ...), or origin: what FILE was made from.",
)
@click.option(
    "--format", "container", type=click.Choice(sorted(set(SUFFIXES.values()))), help="Container; default: by suffix."
)
@click.option("--dtype", help="Round the floating tensors to fp16, bf16 or fp32.")
@click.option("--family", help="Family of the base, where the file cannot tell.")
@click.option("--component", help="Only this component (unet, text_encoder ...).")
@click.option(
    "--as",
    "algorithm",
    type=click.Choice(ALGORITHMS),
    help="Rewrite modules exactly as LoRA (LoHa, LoKr, Tucker ...), or fold Tucker cores only (locon).",
)
@click.option(
    "--config-from",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A diffusers folder of the same family: its tokenizers and configs complete the new folder.",
)
@click.option("--repair", is_flag=True, help="Mend keys that were broken by hand first; see hubtool explain.")
@click.option("--in-place", is_flag=True, help="Rewrite only the header of the source.")
@click.option("--verify", is_flag=True, help="Rebuild every module's change from both files and compare.")
@click.option("--allow-loss", is_flag=True, help="Write even what the target cannot hold in full.")
@force_option
@dry_run_option
@json_option
@pass_state
def command(state: State, /, sources: tuple[str, ...], out: Path | None, out_dir: Path | None, **asked: Any) -> None:
    """Convert SOURCES (files, folders or library REFs) without losing a number.

    A loss is refused unless allowed. The header keeps a receipt of the origin, so that converting back gives the same bytes.
    """
    fields = ("layout", "dtype", "family", "component", "algorithm", "repair", "config_from")
    target = Target(asked["container"], **{name: asked[name] for name in fields})
    flags = {name: asked[name] for name in ("allow_loss", "force", "dry_run", "in_place", "verify")}
    options = Options(**flags, library=state.library)
    if out and (out_dir or len(sources) > 1 or options.in_place):
        raise UsageProblem("-o names one output", hint="give --out-dir for several sources")
    if not (out or out_dir or options.in_place or options.dry_run):
        raise UsageProblem("no output is named", hint="give -o OUT, --out-dir DIR, --in-place or --dry-run")
    if len(sources) == 1:
        _report(_one(sources[0], out, out_dir, target, options), asked["as_json"])
        return
    _many(sources, out_dir, target, options, asked["as_json"])


def _one(ref: str, out: Path | None, out_dir: Path | None, target: Target, options: Options) -> Converted:
    source = locate(ref, options.library)
    destination = out or (_beside(source, out_dir, target.format) if out_dir else None)
    if destination is not None and not options.dry_run:
        destination.parent.mkdir(parents=True, exist_ok=True)
    with output.progress(f"converting {source.name}") as advance:
        return convert(source, destination, target, options, advance)


def _many(sources: tuple[str, ...], out_dir: Path | None, target: Target, options: Options, as_json: bool) -> None:
    done, failed = [], []
    for source in sources:
        try:
            done.append(_one(source, None, out_dir, target, options))
        except HubtoolError as error:
            failed.append({"source": source, "error": error.to_json()})
            output.complain(f"{source}: {error.message}")
    if as_json:
        output.print_json({"converted": [one.to_json() for one in done], "failed": failed})
    else:
        for one in done:
            _describe(one)
    if failed:
        raise PartialFailure(f"{len(failed)} of {len(sources)} files were not converted")


def _beside(source: Path, folder: Path, container: str | None) -> Path:
    if container:
        extension = _EXTENSION[container]
    else:
        extension = source.suffix if source.suffix in SUFFIXES or source.is_dir() else ".safetensors"
    return folder / (source.stem + extension)


def _report(done: Converted, as_json: bool) -> None:
    if as_json:
        output.print_json(done.to_json())
    else:
        _describe(done)


def _describe(done: Converted) -> None:
    plan = done.plan
    output.show(f"{plan.source} -> {done.output or '(dry run)'}")
    layout = f"layout {plan.layout or '-'}"
    size = human_size(done.size)
    output.show(f"  {plan.format}, {layout}, {_counted(len(plan.tensors), 'tensor')}, {size}, {plan.fidelity}")
    output.details(_details(plan, everything=done.output is None), done.warning)
    if done.verdict is not None:
        verdict = done.verdict
        output.show(f"  verify: {_counted(verdict.modules, 'module')}, worst relative error {verdict.worst:.3g}")
        for line in _first([f"missing: {name}" for name in verdict.missing], "missing"):
            output.show(f"  {line}")


def _details(plan: Plan, *, everything: bool) -> Iterator[str]:
    """What a conversion changes besides names. ``everything``: a dry run lists each rename of a repair."""
    if plan.repair is not None:
        yield from (f"repaired: {title}" for _, title in plan.repair.rules)
        renames = [f"renamed: {old} -> {new}" for old, new in plan.repair.renames.items()]
        yield from renames if everything else _first(renames, "renamed", 2)
    yield from _promoted(plan)
    yield from _first([f"loss: {loss.what}: {loss.reason}" for loss in plan.losses], "loss")
    yield from _first([f"rounded: {module}: {why}" for module, why in plan.rounded.items()], "rounded", 5)
    yield from _first([f"note: {note}" for note in plan.notes], "note")


def _promoted(plan: Plan) -> Iterator[str]:
    """``as lora: 192 modules, loha rank 8 -> lora rank 64``, a line for each kind of change."""
    rows = Counter((one.before, one.rank_before, one.after, one.rank_after) for one in plan.promotions)
    lines = [
        f"rewritten: {_counted(count, 'module')}, {before} rank {rank or '-'} -> {after} rank {cost}"
        for (before, rank, after, cost), count in rows.items()
    ]
    yield from _first(lines, "rewritten")


def _first(lines: list[str], what: str, most: int = _MOST) -> list[str]:
    left = len(lines) - most
    return lines if left <= 0 else [*lines[:most], f"{what}: {left} more"]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
