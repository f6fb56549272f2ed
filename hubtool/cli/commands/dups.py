"""List files that are the same, in bytes or in weights."""

from __future__ import annotations

import click

from hubtool.cli.amounts import human_size
from hubtool.cli.changes import QUERY_SETTINGS
from hubtool.cli.context import State, format_option, pass_state
from hubtool.cli.output import listing, say


@click.command(context_settings=QUERY_SETTINGS)
@click.argument("query", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--tier", type=click.Choice(("exact", "payload", "content")), default="exact", show_default=True,
    help="exact: all bytes; payload: all but the header; content: the same weights in any layout or container.",
)  # fmt: skip
@click.option(
    "--keep", type=click.Choice(("oldest", "newest", "shortest", "tagged")), default="oldest", show_default=True,
    help="Which file of a group is the one to keep.",
)  # fmt: skip
@format_option
@pass_state
def command(state: State, query: tuple[str, ...], tier: str, keep: str, fmt: str) -> None:
    """List groups of the same files, the most wasteful first. Only computed hashes count; hard links are one file.

    --format paths prints what is not to be kept: hubtool dups --format paths | xargs -d '\\n' hubtool rm --yes
    """
    from hubtool.actions.duplicates import COLUMNS, duplicates
    from hubtool.actions.library import reading

    with reading(state.library) as reader:
        groups = duplicates(reader, query, tier=tier, keep=keep)
    rows = [row for number, group in enumerate(groups, 1) for row in group.rows(number)]
    listing([row for row in rows if fmt != "paths" or not row["keep"]], COLUMNS, fmt)
    say(f"{len(groups)} groups, {human_size(sum(group.wasted for group in groups))} taken twice")
