"""Convert between containers, key layouts, embedding encodings and dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hubtool.actions.convert import Converted, Options, convert
from hubtool.cli import output
from hubtool.cli.context import State, dry_run_option, force_option, json_option, pass_state
from hubtool.errors import HubtoolError, PartialFailure, UsageProblem
from hubtool.ops.convert import SUFFIXES, Target

_EXTENSION = {"safetensors": ".safetensors", "torch-zip": ".pt", "peft-folder": ""}


@click.command(
    epilog="""\b
Examples:
  hubtool convert style.safetensors -o out.safetensors --layout diffusers
  hubtool convert out.safetensors -o back.safetensors --layout kohya
  hubtool convert model.ckpt -o model.safetensors
  hubtool convert *.pt --out-dir safe/ --format safetensors
  hubtool convert style.safetensors --layout kohya/diffusers --dry-run
"""
)
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Output file (one source).")
@click.option("--out-dir", type=click.Path(path_type=Path, file_okay=False), help="Folder for the outputs.")
@click.option(
    "--layout", help="Key layout (kohya, diffusers, comfy, peft ...) or embedding encoding (a1111, kohya ...)."
)
@click.option(
    "--format", "container", type=click.Choice(sorted(set(SUFFIXES.values()))), help="Container; default: by suffix."
)
@click.option("--dtype", help="Round the floating tensors to fp16, bf16 or fp32.")
@click.option("--family", help="Family of the base, where the file cannot tell.")
@click.option("--component", help="Only this component (unet, text_encoder ...).")
@click.option("--in-place", is_flag=True, help="Rewrite only the header of the source.")
@click.option("--verify", is_flag=True, help="Rebuild every module's change from both files and compare.")
@click.option("--allow-loss", is_flag=True, help="Write even what the target cannot hold in full.")
@force_option
@dry_run_option
@json_option
@pass_state
def command(state: State, /, sources: tuple[Path, ...], out: Path | None, out_dir: Path | None, **asked: Any) -> None:
    """Convert SOURCES without losing a number.

    A loss is refused unless allowed. The header keeps a receipt of the origin, so that converting back gives the same bytes.
    """
    target = Target(asked["container"], asked["layout"], asked["dtype"], asked["family"], asked["component"])
    flags = {name: asked[name] for name in ("allow_loss", "force", "dry_run", "in_place", "verify")}
    options = Options(**flags, library=state.library)
    if out and (out_dir or len(sources) > 1 or options.in_place):
        raise UsageProblem("-o names one output", hint="give --out-dir for several sources")
    if not (out or out_dir or options.in_place or options.dry_run):
        raise UsageProblem("no output is named", hint="give -o OUT, --out-dir DIR, --in-place or --dry-run")
    if len(sources) == 1:
        destination = out or (_beside(sources[0], out_dir, target.format) if out_dir else None)
        _report(_one(sources[0], destination, target, options), asked["as_json"])
        return
    _many(sources, out_dir, target, options, asked["as_json"])


def _one(source: Path, destination: Path | None, target: Target, options: Options) -> Converted:
    if destination is not None and not options.dry_run:
        destination.parent.mkdir(parents=True, exist_ok=True)
    with output.progress(f"converting {source.name}") as advance:
        return convert(source, destination, target, options, advance)


def _many(sources: tuple[Path, ...], out_dir: Path | None, target: Target, options: Options, as_json: bool) -> None:
    done, failed = [], []
    for source in sources:
        destination = _beside(source, out_dir, target.format) if out_dir else None
        try:
            done.append(_one(source, destination, target, options))
        except HubtoolError as error:
            failed.append({"source": str(source), "error": error.to_json()})
            output.complain(f"{source}: {error.message}")
    if as_json:
        output.print_json({"converted": [one.to_json() for one in done], "failed": failed})
    else:
        for one in done:
            _describe(one)
    if failed:
        raise PartialFailure(f"{len(failed)} of {len(sources)} files were not converted")


def _beside(source: Path, folder: Path, container: str | None) -> Path:
    extension = _EXTENSION[container] if container else (source.suffix if source.suffix in SUFFIXES else ".safetensors")
    return folder / (source.stem + extension)


def _report(done: Converted, as_json: bool) -> None:
    if as_json:
        output.print_json(done.to_json())
    else:
        _describe(done)


def _describe(done: Converted) -> None:
    plan = done.plan
    where = done.output or "(dry run)"
    output.show(f"{plan.source} -> {where}")
    output.show(
        f"  {plan.format}, layout {plan.layout or '-'}, {len(plan.tensors)} tensors, {output.human_size(done.size)}, {plan.fidelity}"
    )
    for loss in plan.losses:
        output.show(f"  loss: {loss.what}: {loss.reason}")
    for module, why in list(plan.rounded.items())[:5]:
        output.show(f"  rounded: {module}: {why}")
    if len(plan.rounded) > 5:
        output.show(f"  rounded: {len(plan.rounded) - 5} more")
    for note in plan.notes:
        output.show(f"  note: {note}")
    if done.warning:
        output.complain(done.warning, "warning")
    if done.verdict is not None:
        verdict = done.verdict
        output.show(f"  verify: {verdict.modules} modules, worst relative error {verdict.worst:.3g}")
