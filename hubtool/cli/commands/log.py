"""List what commands changed: user data, moved and removed files."""

from __future__ import annotations

import click

from hubtool.cli.context import State, format_option, pass_state
from hubtool.cli.output import listing


@click.command()
@click.argument("ref", metavar="[ID]", required=False)
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="At most so many rows.")
@format_option
@pass_state
def command(state: State, ref: str | None, limit: int, fmt: str) -> None:
    """List the newest changes, or the steps of the change ID. hubtool undo [ID] takes one back."""
    from hubtool.actions import undo
    from hubtool.actions.library import reading
    from hubtool.registry import journal

    with reading(state.library) as reader:
        if ref is None:
            listing(undo.log(reader, limit), undo.COLUMNS, fmt)
            return
        steps = undo.to_json(journal.record(reader, ref)).get("steps", [])
    rows = [{"path": step.get("artifact", step.get("from", "")), **step} for step in steps]
    listing(rows, ("op", "done", "path", "to"), fmt)
