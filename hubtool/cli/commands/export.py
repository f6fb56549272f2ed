"""Write what you said about artifacts, with their hashes, to a file that `import` reads."""

from __future__ import annotations

import click

from hubtool.cli.changes import QUERY_SETTINGS
from hubtool.cli.context import State, pass_state
from hubtool.cli.output import listing


@click.command(context_settings=QUERY_SETTINGS)
@click.argument("query", nargs=-1, type=click.UNPROCESSED)
@click.option("--said", is_flag=True, help="Only artifacts that you said something about.")
@click.option("--json", "fmt", flag_value="json", help="Short for --format json.")
@click.option(
    "--format",
    "fmt",
    type=click.Choice(("ndjson", "json", "csv")),
    default="ndjson",
    show_default=True,
    help="How to print the rows.",
)
@pass_state
def command(state: State, query: tuple[str, ...], said: bool, fmt: str) -> None:
    """Print title, notes, rating, favorite and tags of the artifacts that QUERY finds, keyed by their hashes, a line each.

    hubtool import says the same in another library, wherever the files lie there.
    """
    from hubtool.actions.exchange import COLUMNS, export
    from hubtool.actions.library import open_store

    with open_store(state.library) as store:
        listing(export(store, query, said_only=said), COLUMNS, fmt)
