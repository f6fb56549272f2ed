"""Add tags to artifacts and take tags off."""

from __future__ import annotations

import click

from hubtool.cli.changes import QUERY_SETTINGS, print_changes
from hubtool.cli.context import State, dry_run_option, json_option, pass_state


@click.command(context_settings=QUERY_SETTINGS)
@click.argument("words", metavar="REF|QUERY... +TAG... -TAG...", nargs=-1, type=click.UNPROCESSED)
@dry_run_option
@json_option
@pass_state
def command(state: State, words: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Add +TAG to, and take -TAG off, the artifacts that REF... or a QUERY chooses: hubtool tag family:sdxl +style -todo.

    Tags belong to the bytes of a file, wherever it lies. hubtool undo takes the change back.
    """
    from hubtool.actions.curate import edit, split_tags
    from hubtool.actions.library import open_store

    chosen, assignments = split_tags(words)
    with open_store(state.library) as store:
        changes = edit(store, chosen, assignments, "tag", dry_run=dry_run)
    print_changes(changes, dry_run, as_json)
