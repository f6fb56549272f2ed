"""Turn the difference of two checkpoints into an adapter: LoRA, LoCon or full differences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from hubtool.actions import extract as actions
from hubtool.actions.extract import Extracted, Options
from hubtool.cli import output
from hubtool.cli.amounts import human_size
from hubtool.cli.context import State, dry_run_option, force_option, json_option, pass_state
from hubtool.cli.factor_options import extraction, extraction_options, output_option, running_options
from hubtool.errors import UsageProblem

_MOST = 5  # of a list that may have an entry for every module


@click.command(
    epilog="""\b
Examples:
  hubtool extract sd15.safetensors tuned.safetensors --rank 32 -o style.safetensors
  hubtool extract base-folder/ tuned.ckpt --rank 32 --as lora -o style.safetensors
  hubtool extract base.safetensors tuned.safetensors --error 0.2 -o style.safetensors
  hubtool extract base.safetensors tuned.safetensors --budget 80MB -o style.safetensors
  hubtool extract base.safetensors tuned.safetensors --as full -o difference.safetensors
"""
)
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("tuned", type=click.Path(path_type=Path))
@output_option
@extraction_options
@running_options
@force_option
@dry_run_option
@json_option
@pass_state
def command(state: State, /, base: Path, tuned: Path, out: Path | None, **asked: Any) -> None:
    """Extract what TUNED has learnt beyond BASE: checkpoints in any container and layout, single file or diffusers folder.

    Every module gets its best approximation by singular values; error, rank and what is left out are reported. Equal input gives equal
    bytes.
    """
    if out is None and not asked["dry_run"]:
        raise UsageProblem("no output is named", hint="give -o OUT, or --dry-run")
    container = None if out is None else actions.format_of(out)
    task = actions.prepare(base, tuned, extraction(asked, container), state.library)
    if asked["dry_run"] or out is None:
        _preview(task.to_json(), asked["as_json"])
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    options = Options(asked["allow_loss"], asked["force"], state.library)
    with output.progress(f"extracting {tuned.name}", task.total) as advance:
        done = actions.extract(task, out, options, advance)
    if asked["as_json"]:
        output.print_json(done.to_json())
    else:
        _describe(done)


def _preview(known: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.print_json(known)
        return
    output.show(f"{known['family']}, layout {known['layout']}, at most {human_size(known['bytes_at_most'])} (dry run)")
    for component, count in known["modules"].items():
        output.show(f"  {component}: {count} modules to decompose")
    if known["differences"]:
        output.show(f"  {known['differences']} tensors as differences")
    for reason, count in known["left_out"].items():
        output.show(f"  left out: {count} tensors: {reason}")
    for name in ("only_base", "only_tuned"):
        if known[name]:
            output.show(f"  {name.replace('_', ' in ')}: {known[name]} tensors")


def _describe(done: Extracted) -> None:
    report = done.report
    output.show(f"{done.output}")
    ranks = sorted({one.rank for one in report.modules})
    spread = "-" if not ranks else f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    size = human_size(done.size)
    output.show(f"  {report.family}, layout {done.plan.layout}, {len(report.modules)} decomposed, {spread}, {size}")
    if report.error is not None:
        output.show(f"  error {report.error:.4f} of the change ({1 - report.error**2:.1%} of its energy kept)")
    output.details(_details(done), done.warning)


def _details(done: Extracted) -> Iterator[str]:
    report = done.report
    for name, one in report.components.items():
        if one.changed or one.unchanged:
            yield f"{name}: {one.changed} changed, {one.unchanged} unchanged"
    if report.dense:
        yield f"{len(report.dense)} tensors as differences"
    for reason, names in report.left.items():
        yield f"left out, though changed: {len(names)} tensors: {reason}"
    for side, names in (("base", report.only_base), ("tuned", report.only_tuned)):
        if names:
            yield f"only in {side}: {len(names)} tensors, first {names[0]}"
    if report.missed:
        yield f"above the error asked for, at the most ranks allowed: {len(report.missed)} modules, first {report.missed[0]}"
    notes = [f"note: {note}" for note in done.plan.notes]
    yield from notes[:_MOST]
    if len(notes) > _MOST:
        yield f"note: {len(notes) - _MOST} more"
