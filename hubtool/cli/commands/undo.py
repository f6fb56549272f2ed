"""Take back the last change, or one that the log names."""

from __future__ import annotations

import click

from hubtool.cli.context import State, dry_run_option, json_option, pass_state
from hubtool.cli.output import print_json, say, show
from hubtool.errors import HubtoolError, PartialFailure


@click.command()
@click.argument("ref", metavar="[ID]", required=False)
@dry_run_option
@json_option
@pass_state
def command(state: State, ref: str | None, dry_run: bool, as_json: bool) -> None:
    """Take back the change ID (hubtool log), or the last one: user data as before, files moved back or out of the trash.

    What was changed again since is left as it is, and said.
    """
    from hubtool.actions import undo
    from hubtool.actions.library import open_store, reading
    from hubtool.registry import journal

    if dry_run:
        with reading(state.library) as reader:
            record = undo.to_json(journal.record(reader, ref))
        print_json(record) if as_json else show(f"{record['id']}  {record['at']}  {record['summary']}")
        return
    with open_store(state.library) as store:
        result = undo.undo(store, ref)
    if as_json:
        print_json(result.to_json())
    else:
        show(f"undone: {result.record.summary} ({result.undone} of {result.undone + len(result.left)} steps)")
    for reason in result.left:
        say(f"left: {reason}")
    if result.left:
        kind = PartialFailure if result.undone else HubtoolError
        raise kind(f"{len(result.left)} steps could not be taken back: {'; '.join(result.left[:5])}")
