"""List what the library holds, filtered by a query."""

from __future__ import annotations

import click

from hubtool.cli.changes import QUERY_SETTINGS
from hubtool.cli.context import State, format_option, pass_state
from hubtool.cli.output import listing


@click.command(context_settings=QUERY_SETTINGS)
@click.argument("query", nargs=-1, type=click.UNPROCESSED)
@click.option("--kind", help="lora, textual_inversion, checkpoint ...")
@click.option("--family", help="sd1, sdxl, flux1 ...")
@click.option("--algorithm", help="lora, loha, lokr, oft ...")
@click.option("--path", help="Part of the path.")
@click.option("--text", help="Text in title, file name, trigger words, tags, notes or metadata.")
@click.option("--sort", help="A field, -FIELD for descending; several with commas.")
@click.option("--limit", type=click.IntRange(0), help="At most so many rows.")
@format_option
@pass_state
def command(
    state: State, query: tuple[str, ...], kind: str | None, family: str | None, algorithm: str | None, path: str | None,
    text: str | None, sort: str | None, limit: int | None, fmt: str,
) -> None:  # fmt: skip
    """List artifacts.

    QUERY: kind:lora family:sdxl rank:8..32 size:>100M -kind:vae tag:style path:~anime word "two words" (a | b) sort:-size limit:20.
    The names of the fields: hubtool fields.
    """
    from hubtool.actions import catalogue
    from hubtool.actions.library import reading

    options = {"kind": kind, "family": family, "algorithm": algorithm, "path": path}
    with reading(state.library) as reader:
        rows = catalogue.ls(reader, query, options=options, text=text, sort=sort, limit=limit)
    listing(rows, catalogue.COLUMNS, fmt)
