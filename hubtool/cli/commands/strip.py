"""Take EMA copies, training state or components out of a file, or cast it; what stays keeps its bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from hubtool.actions.strip import Options, Stripped, format_of, strip
from hubtool.cli import output
from hubtool.cli.amounts import human_size
from hubtool.cli.context import State, dry_run_option, force_option, json_option, pass_state
from hubtool.errors import UsageProblem
from hubtool.ops.strip.casting import DTYPES
from hubtool.ops.strip.planning import EMA, Request

_MOST = 8


@click.command(
    epilog="""\b
Examples:
  hubtool strip model.ckpt -o model.safetensors
  hubtool strip model.safetensors --drop vae -o without-vae.safetensors
  hubtool strip model.safetensors --keep unet --dtype fp16 -o unet.safetensors
  hubtool strip model-ema.ckpt --ema use -o averaged.safetensors
"""
)
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Output file or folder.")
@click.option("--keep", multiple=True, metavar="COMPONENT", help="Only these (unet, text_encoder ...; repeatable).")
@click.option("--drop", multiple=True, metavar="COMPONENT", help="All but these (repeatable).")
@click.option(
    "--ema", type=click.Choice(EMA), default="drop", show_default=True,
    help="EMA copies: leave them out, keep them, or use them in place of the weights.",
)  # fmt: skip
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Round floating weights; losses are counted.")
@click.option(
    "--saturate", is_flag=True, help="Numbers beyond the range of --dtype become its largest, instead of an error."
)
@click.option("--family", help="Family of the file, where it cannot tell.")
@click.option("--allow-loss", is_flag=True, help="Write even what the container cannot hold in full.")
@force_option
@dry_run_option
@json_option
@pass_state
def command(state: State, /, source: Path, out: Path | None, as_json: bool, dry_run: bool, **asked: Any) -> None:
    """Write SOURCE without EMA copies, training state and the components named; tensors that stay are copied byte for byte."""
    if out is None and not dry_run:
        raise UsageProblem("no output is named", hint="give -o OUT, or --dry-run")
    names = ("keep", "drop", "ema", "dtype", "saturate", "family")
    request = Request(**{name: asked[name] for name in names}, format=format_of(out))
    options = Options(asked["allow_loss"], asked["force"], dry_run, state.library)
    if out is not None and not dry_run:
        out.parent.mkdir(parents=True, exist_ok=True)
    with output.progress(f"stripping {source.name}") as advance:
        done = strip(source, out, request, options, advance)
    if as_json:
        output.print_json(done.to_json())
    else:
        _describe(done)


def _describe(done: Stripped) -> None:
    output.show(f"{done.plan.source} -> {done.output or '(dry run)'}")
    output.details(_lines(done), done.warning)


def _lines(done: Stripped) -> Iterator[str]:
    report = done.report
    for title, amounts in (("removed", report.removed), ("kept", report.kept)):
        for name, one in amounts.items():
            yield f"{title}: {name}, {one.tensors} tensors, {human_size(one.bytes)}"
    if report.caster is not None:
        yield f"cast to {report.caster.dtype}: {report.cast} tensors"
        lost = report.caster.lost
        for name, loss in list(lost.items())[:_MOST]:
            yield f"lost in {name}: {loss.overflow} overflow, {loss.underflow} underflow, {loss.nonfinite} not finite before"
        if len(lost) > _MOST:
            yield f"lost in {len(lost) - _MOST} more"
    yield f"{done.plan.format}, {human_size(done.size)}"
