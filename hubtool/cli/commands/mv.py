"""Move files to another folder, or into folders and names made from what is known of them."""

from __future__ import annotations

from pathlib import Path

import click

from hubtool.cli.changes import QUERY_SETTINGS, confirm, raise_failed
from hubtool.cli.context import State, dry_run_option, json_option, pass_state
from hubtool.cli.output import print_json, say, show


@click.command(context_settings=QUERY_SETTINGS)
@click.argument("words", metavar="REF|QUERY...", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--to",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder. Default: the scanned one it lies in.",
)
@click.option("--template", help="Folders and name below it: '{family}/{base|unknown}/{stem}'. Default: '{stem}'.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@dry_run_option
@json_option
@pass_state
def command(
    state: State,
    words: tuple[str, ...],
    folder: Path | None,
    template: str | None,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Move the files of the chosen artifacts, with their previews and sidecars. Nothing is overwritten.

    Template fields: stem ext id kind algorithm family base title rank layout format sha256 tag trigger; {field|fallback}.
    hubtool undo moves everything back.
    """
    from hubtool.actions.library import open_store, reading
    from hubtool.actions.move import move, plan

    with reading(state.library) as reader:
        found = plan(reader, words, folder.absolute() if folder else None, template)
    if as_json and dry_run:
        print_json({"moves": [one.to_json() for one in found]})
    if not as_json:
        for one in found:
            show(f"{one.place.path}\n  -> {one.target}" + "".join(f"\n  with {old}" for old, _ in one.beside))
    say(f"{len(found)} files to move")
    if dry_run or not found:
        return
    confirm(f"move {len(found)} files?", yes)
    with open_store(state.library) as store:
        outcome = move(store, found)
    if as_json:
        print_json(outcome.to_json())
    else:
        say(f"{len(outcome.moved)} moved; hubtool undo {outcome.journal} takes it back")
    raise_failed(outcome.failed, len(outcome.moved))
