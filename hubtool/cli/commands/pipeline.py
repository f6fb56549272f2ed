"""Write a base with adapters collapsed as a pipeline of its own: a diffusers folder or a single file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from hubtool.actions.pipeline_export import Exported, Options, export
from hubtool.cli import output
from hubtool.cli.amounts import human_size
from hubtool.cli.commands.collapse import named
from hubtool.cli.context import State, dry_run_option, force_option, json_option, pass_state
from hubtool.errors import UsageProblem
from hubtool.ops.extract.request import DTYPES, parse_size

_MOST = 8  # of a list that may have an entry for every module
_SAME = (
    "dtype", "config_from", "family", "allow_mismatch", "allow_loss", "hashes", "force", "dry_run", "device", "workers",
)  # fmt: skip


@click.group(
    epilog="""\b
Examples:
  hubtool pipeline export sd15/ style.safetensors=0.8 cat.pt -o styled/
  hubtool pipeline export owner/base style.safetensors --dtype fp16 -o styled/
  hubtool pipeline export model.safetensors style.safetensors --config-from sd15/ -o styled/
  hubtool pipeline export sd15/ style.safetensors -o styled.safetensors
"""
)
def command() -> None:
    """Whole pipelines: a base with adapters, written for programs that know nothing of adapters."""


@command.command(name="export")
@click.argument("base")
@click.argument("adapters", nargs=-1, metavar="[ADAPTER[=STRENGTH]]...")
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="A folder, or FILE.safetensors.")
@click.option("--strength", "strengths", multiple=True, help="By component or module: unet=0.5,text_encoder=0.")
@click.option("--blocks", help="Block weights: a list of numbers (12, 17, 19, 20, 25, 26 ...) or a preset.")
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), help="Of all weights.  [default: the base's]")
@click.option("--shard", metavar="SIZE", help="Largest weights file (5GB).  [default: 10GB, and the base's own shards]")
@click.option(
    "--config-from",
    type=click.Path(path_type=Path),
    help="Folder with configurations and tokenizers for a single file.",
)
@click.option("--family", help="Family of base and adapters, where a file cannot tell.")
@click.option("--skip-mismatched", "allow_mismatch", is_flag=True, help="Leave modules out that do not fit the base.")
@click.option("--allow-loss", is_flag=True, help="Write even what the output cannot hold in full.")
@click.option(
    "--hash-inputs", "hashes", is_flag=True, help="Put the SHA-256 of a base above 1 GiB into the recipe, too."
)
@click.option("--no-download", is_flag=True, help="Take repositories from the Hub's cache only.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu or cuda.")
@click.option("--workers", type=click.IntRange(1), help="Threads; default: one a processor.")
@force_option
@dry_run_option
@json_option
@pass_state
def export_(state: State, /, base: str, adapters: tuple[str, ...], out: Path | None, **asked: Any) -> None:
    """Write BASE with any adapters collapsed: weights summed in fp32 and rounded once, new tokens in tokenizers and text encoders.

    BASE is a diffusers folder, a single file, a library REF or a Hub repository. The folder opens with DiffusionPipeline.from_pretrained
    and needs no adapter any more. Kinds that change no weights (null-text, aesthetic gradients) are refused.
    """
    if out is None and not asked["dry_run"]:
        raise UsageProblem("no output is named", hint="give -o OUT or --dry-run")
    inputs = [named(text, asked["strengths"], asked["blocks"]) for text in adapters]
    shard = None if asked["shard"] is None else parse_size(asked["shard"])
    options = Options(
        **{name: asked[name] for name in _SAME}, shard=shard, download=not asked["no_download"], library=state.library
    )
    if out is not None and not options.dry_run:
        out.parent.mkdir(parents=True, exist_ok=True)
    with output.progress(f"exporting {Path(base).name}") as advance:
        done = export(base, inputs, out or Path("export"), options, advance)
    if asked["as_json"]:
        output.print_json(done.to_json())
    else:
        _describe(done)


def _describe(done: Exported) -> None:
    output.show(f"{done.plan.source} -> {done.output or '(dry run)'}")
    output.show(f"  {done.plan.format}, {human_size(done.size)}")
    output.details(_lines(done), done.warning)


def _lines(done: Exported) -> Iterator[str]:
    yield from map(str, done.accounts)
    for encoder, tokens in done.tokens.items():
        yield f"{encoder}: new tokens {', '.join(tokens)}"
    yield from (f"rounded: {what}: {why}" for what, why in done.plan.rounded.items())
    lines = [f"loss: {loss.what}: {loss.reason}" for loss in done.plan.losses]
    lines += [f"note: {note}" for note in (*done.notes, *done.plan.notes)]
    yield from lines[:_MOST]
    if len(lines) > _MOST:
        yield f"{len(lines) - _MOST} more losses and notes"
