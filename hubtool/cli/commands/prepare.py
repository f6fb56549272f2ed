"""Prepare a folder of pictures for training: check, deduplicate, cut, caption, mask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from hubtool.actions.prepare import CAPTIONS, CROPS, DUPLICATES, Options, Prepared, prepare
from hubtool.cli import output
from hubtool.cli.context import dry_run_option, json_option

_MOST = 20  # dropped pictures that are listed
_FOLDER = click.Path(path_type=Path)


@click.command(
    epilog="""\b
Examples:
  hubtool prepare photos/ -o cats/ --resolution 1024
  hubtool prepare photos/ -o cats/ --captions template --template "a photo of {token}" --token "<cat>"
  hubtool prepare photos/ -o cats/ --masks --crop mask --no-buckets
  hubtool prepare photos/ -o cats/ --captions model --caption-model blip-base/ --prefix "sks cat, "
"""
)
@click.argument("folder", type=_FOLDER)
@click.option("-o", "--output", "out", type=_FOLDER, help="A new folder; the pictures in FOLDER stay as they are.")
@click.option(
    "--resolution",
    type=click.IntRange(8, 8192),
    default=512,
    show_default=True,
    help="Side of a square of the same area.",
)
@click.option(
    "--crop",
    type=click.Choice(CROPS),
    default="centre",
    show_default=True,
    help="What is kept of a picture; none: all of it.",
)
@click.option(
    "--crops",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Windows of each picture, with --crop random.",
)
@click.option("--buckets/--no-buckets", default=True, show_default=True, help="Keep shapes roughly, or make squares.")
@click.option(
    "--duplicates",
    type=click.Choice(DUPLICATES),
    default="perceptual",
    show_default=True,
    help="Which duplicates are dropped.",
)
@click.option(
    "--distance",
    type=click.IntRange(0, 32),
    default=4,
    show_default=True,
    help="Bits of 64 in which perceptual duplicates differ.",
)
@click.option(
    "--least", type=click.IntRange(1), default=64, show_default=True, help="Shortest side that is kept, in pixels."
)
@click.option("--blur", type=click.FloatRange(0), default=0.0, help="Drop pictures less sharp than this (try 20).")
@click.option(
    "--captions", type=click.Choice(CAPTIONS), default="keep", show_default=True, help="Where captions come from."
)
@click.option("--template", multiple=True, help="Caption with {token} and {name}; or object, or style. Repeatable.")
@click.option("--token", "tokens", multiple=True, help="What {token} stands for.")
@click.option("--prefix", default="", help="Words at the start of every caption.")
@click.option("--caption-model", type=_FOLDER, help="Local folder of an image-to-text model (BLIP, GIT ...).")
@click.option("--masks", is_flag=True, help="Keep masks: NAME.mask.png beside the picture, or its alpha channel.")
@click.option("--mask-model", type=_FOLDER, help="Local folder of CLIPSeg, for pictures without a mask.")
@click.option("--mask-text", default="", help="What that mask shall cover.")
@click.option(
    "--format",
    type=click.Choice(["png", "jpg", "webp"]),
    default="png",
    show_default=True,
    help="Of the pictures written.",
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Of random windows and templates.")
@dry_run_option
@json_option
def command(folder: Path, out: Path | None, dry_run: bool, as_json: bool, **asked: Any) -> None:
    """Make a folder for training of the pictures in FOLDER, with captions, metadata.jsonl and a report with pictures (report.html)."""
    with output.progress(f"preparing {folder.name}") as advance:
        done = prepare(folder, out, Options(**asked), dry_run=dry_run, advance=advance)
    if as_json:
        output.print_json(done.to_json())
    else:
        output.show("\n".join(_lines(done)))


def _lines(done: Prepared) -> Iterator[str]:
    place = "(dry run)" if done.output is None else str(done.output / "report.html")
    yield f"{len(done.kept)} kept, {len(done.dropped)} dropped: {place}"
    yield from (f"  {size}: {count}" for size, count in sorted(done.sizes.items()))
    yield from (f"  dropped {name}: {reason}" for name, reason in list(done.dropped.items())[:_MOST])
    if len(done.dropped) > _MOST:
        yield f"  and {len(done.dropped) - _MOST} more"
