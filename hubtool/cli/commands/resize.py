"""Give an adapter other ranks: a number, a share of its energy, an error, or what fits into a size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from hubtool.actions.resize import Options, Resized, resize
from hubtool.cli import output
from hubtool.cli.amounts import human_size
from hubtool.cli.context import State, dry_run_option, force_option, json_option, pass_state
from hubtool.cli.factor_options import budget, output_option, rank_options, running_options
from hubtool.ops.extract.request import DTYPES
from hubtool.ops.merge_adapters import Request

_MOST = 5  # of a list that may have an entry for every module


@click.command(
    epilog="""\b
Examples:
  hubtool resize style.safetensors --rank 32 -o small.safetensors
  hubtool resize style.safetensors --rank 32 --across -o small.safetensors
  hubtool resize style.safetensors --error 0.05 -o small.safetensors
  hubtool resize style.safetensors --energy 0.99 --max-rank 64 -o small.safetensors
  hubtool resize style.safetensors --budget 40MB --dtype fp16 -o small.safetensors
"""
)
@click.argument("source", type=click.Path(path_type=Path))
@output_option
@rank_options(conv=False)
@click.option("--alpha", type=float, help="Alpha of every module.  [default: its rank]")
@click.option("--layout", help="Key layout (kohya, diffusers, comfy, peft ...).  [default: the input's]")
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), help="Of the output.  [default: the input's]")
@click.option("--family", help="Family of the base, where the file cannot tell.")
@click.option("--component", help="Only this component (unet, text_encoder ...).")
@running_options
@force_option
@dry_run_option
@json_option
@pass_state
def command(state: State, /, source: Path, out: Path | None, **asked: Any) -> None:
    """Resize SOURCE: every module becomes the best approximation of itself that its ranks allow.

    Convolutions and Tucker cores included; a LoHa or LoKr becomes a LoRA. The error is reported for every module and in total. Equal input
    gives equal bytes.
    """
    options = Options(asked["allow_loss"], asked["force"], asked["dry_run"], state.library, asked["device"])
    with output.progress(f"resizing {source.name}") as advance:
        done = resize(source, out, _request(asked), options, advance)
    if asked["as_json"]:
        output.print_json(done.to_json())
    else:
        _describe(done)


def _request(asked: dict[str, Any]) -> Request:
    same = {name: asked[name] for name in ("alpha", "layout", "dtype", "family", "component", "workers")}
    return Request(budget=budget(asked), **same)


def _describe(done: Resized) -> None:
    report, size = done.report, human_size(done.size)
    output.show(f"{done.plan.source} -> {done.output or '(dry run)'}")
    before = _span(sorted({rank for one in report.modules.values() for rank in one.ranks if rank}))
    after = _span(sorted({one.rank for one in report.modules.values() if one.rank is not None}))
    output.show(f"  layout {done.plan.layout}, {len(report.modules)} modules, rank {before} -> {after}, {size}")
    output.details(_details(done), done.warning)


def _details(done: Resized) -> Iterator[str]:
    report = done.report
    if report.error is not None:
        errors = report.errors()
        worst = max(errors, key=lambda name: errors[name])
        yield f"error {report.error:.4f} of the change ({1 - report.error**2:.1%} of its energy kept)"
        yield f"worst: {worst}, {errors[worst]:.4f}"
    copied = sum(one.how == "copied" for one in report.modules.values())
    if copied:
        yield f"{copied} modules copied as they are"
    if report.dropped:
        yield f"left out, without a rank: {len(report.dropped)} modules, first {report.dropped[0]}"
    lines = [f"loss: {loss.what}: {loss.reason}" for loss in done.plan.losses]
    lines += [f"note: {note}" for note in done.plan.notes]
    yield from lines[:_MOST]
    if len(lines) > _MOST:
        yield f"{len(lines) - _MOST} more losses and notes"


def _span(ranks: list[int]) -> str:
    if not ranks:
        return "-"
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}..{ranks[-1]}"
