"""Set title, notes, rating, favorite or tags of artifacts."""

from __future__ import annotations

import click

from hubtool.cli.changes import QUERY_SETTINGS, print_changes
from hubtool.cli.context import State, dry_run_option, json_option, pass_state


@click.command(context_settings=QUERY_SETTINGS)
@click.argument("words", metavar="REF|QUERY... FIELD=VALUE...", nargs=-1, type=click.UNPROCESSED)
@dry_run_option
@json_option
@pass_state
def command(state: State, words: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Set FIELD=VALUE, add FIELD+=VALUE, take away tag-=VALUE or clear FIELD! : hubtool set path:inbox/ rating=4 tag+=todo.

    Fields: title, notes, rating (0 to 5), favorite (yes, no), tag. hubtool undo takes the change back.
    """
    from hubtool.actions.curate import edit, split
    from hubtool.actions.library import open_store

    chosen, assignments = split(words)
    with open_store(state.library) as store:
        changes = edit(store, chosen, assignments, "set", dry_run=dry_run)
    print_changes(changes, dry_run, as_json)
