"""Read an export and say the same about the files with the same hashes."""

from __future__ import annotations

from typing import BinaryIO

import click

from hubtool.cli.changes import print_changes
from hubtool.cli.context import State, dry_run_option, json_option, pass_state
from hubtool.cli.output import print_json, say


@click.command("import")
@click.argument("file", type=click.File("rb"))
@click.option("--overwrite", is_flag=True, help="Where both say something, FILE wins. Tags are always united.")
@dry_run_option
@json_option
@pass_state
def command(state: State, file: BinaryIO, overwrite: bool, dry_run: bool, as_json: bool) -> None:
    """Read FILE (of hubtool export; - for stdin): what is empty here is filled, tags are united. hubtool undo takes it back."""
    from hubtool.actions.exchange import bring
    from hubtool.actions.library import open_store

    with open_store(state.library) as store:
        found = bring(store, file.read(), overwrite=overwrite, dry_run=dry_run)
    if as_json:
        print_json({**found.to_json(), "dry_run": dry_run})
    else:
        print_changes(found.changes, dry_run, False)
    if found.unmatched:
        say(f"{len(found.unmatched)} of {found.lines} are not in the library: {', '.join(found.unmatched[:5])}")
