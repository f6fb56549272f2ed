"""Turn a fine-tuned pipeline into a LoRA for its base, with the tokens it has learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from hubtool.actions import distill as actions
from hubtool.actions.distill import TOKENS, Distilled, Job, Options
from hubtool.actions.extract import format_of
from hubtool.cli import output
from hubtool.cli.amounts import human_size
from hubtool.cli.context import State, dry_run_option, force_option, json_option, pass_state
from hubtool.cli.factor_options import extraction, extraction_options, output_option, running_options
from hubtool.errors import UsageProblem

_MOST = 5  # of a list that may have an entry for every module


@click.command(
    epilog="""\b
Examples:
  hubtool distill my-dreambooth/ sd15/ --rank 32 -o dog.safetensors
  hubtool distill tuned.safetensors owner/base --error 0.1 --as lora -o style.safetensors
  hubtool distill my-pti/ sdxl/ --rank 16 --layout diffusers -o pti.safetensors
  hubtool distill tuned/ base/ --as full -o difference.safetensors
  hubtool distill tuned.ckpt base.safetensors --rank 32 --token "<dog>" --allow-loss -o dog.safetensors
"""
)
@click.argument("tuned")
@click.argument("base")
@output_option
@extraction_options
@click.option(
    "--tokens", type=click.Choice(TOKENS), default="auto", show_default=True,
    help="New tokens: in the output where its layout has a place for them, or in files beside it.",
)  # fmt: skip
@click.option("--token", "names", multiple=True, help="Name of a new token, where no tokenizer tells; repeatable.")
@click.option("--no-download", is_flag=True, help="Take repositories from the Hub's cache only.")
@running_options
@force_option
@dry_run_option
@json_option
@pass_state
def command(state: State, /, tuned: str, base: str, out: Path | None, **asked: Any) -> None:
    """Distill TUNED, a fine-tuned pipeline, to an adapter for BASE.

    Each is a diffusers folder, a single file, a library REF or a Hub repository. Every module becomes its best approximation by singular
    values; new tokens of the tokenizer become token embeddings. What no adapter can hold is refused unless --allow-loss.
    """
    if out is None and not asked["dry_run"]:
        raise UsageProblem("no output is named", hint="give -o OUT, or --dry-run")
    own = {name: asked[name] for name in ("allow_loss", "force", "tokens", "names")}
    options = Options(**own, download=not asked["no_download"], library=state.library)
    job = actions.prepare(tuned, base, extraction(asked, None if out is None else format_of(out)), options)
    if asked["dry_run"] or out is None:
        _preview(job, asked["as_json"])
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with output.progress(f"distilling {Path(tuned).name}", job.total) as advance:
        done = actions.run(job, out, advance)
    if asked["as_json"]:
        output.print_json(done.to_json())
    else:
        _describe(done)


def _preview(job: Job, as_json: bool) -> None:
    known = job.to_json()
    if as_json:
        output.print_json(known)
        return
    size = human_size(known["bytes_at_most"])
    output.show(f"{known['family']}, layout {known['layout']}, at most {size} (dry run)")
    for component, count in known["modules"].items():
        output.show(f"  {component}: {count} modules to decompose")
    for reason, count in known["left_out"].items():
        output.show(f"  left out where it changed: {count} tensors: {reason}")
    for token in known["tokens"]:
        output.show(f"  {token['encoder']}: new token {token['token']}, {token['vectors']} vectors")


def _describe(done: Distilled) -> None:
    output.show(f"{done.output}")
    output.show(f"  {done.report.family}, layout {done.plan.layout}, {human_size(done.size)}")
    output.details(_lines(done), done.warning)


def _lines(done: Distilled) -> Iterator[str]:
    for name, one in actions.components(done.report).items():
        error = "" if one.error is None else f", rank {_span(one.ranks)}, error {one.error:.4f} of the change"
        yield f"{name}: {one.changed} changed, {one.unchanged} unchanged{error}"
    for token in (one.to_json() for one in done.embeddings):
        yield f"{token['encoder']}: new token {token['token']}, {token['vectors']} vectors"
    yield from (f"beside it: {path}" for path in done.others)
    if done.report.dense:
        yield f"{len(done.report.dense)} tensors as differences"
    yield from _first([f"left out: {loss.what}: {loss.reason}" for loss in done.losses], "losses")
    yield from _first([f"note: {note}" for note in (*done.notes, *done.plan.notes)], "notes")


def _span(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _first(lines: list[str], what: str) -> list[str]:
    left = len(lines) - _MOST
    return lines if left <= 0 else [*lines[:_MOST], f"{left} more {what}"]
