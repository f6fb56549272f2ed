"""Put files into the trash, or only forget them."""

from __future__ import annotations

import click

from hubtool.cli.amounts import human_size
from hubtool.cli.changes import QUERY_SETTINGS, confirm, raise_failed
from hubtool.cli.context import State, dry_run_option, json_option, pass_state
from hubtool.cli.output import print_json, say, show
from hubtool.errors import UsageProblem


@click.command(context_settings=QUERY_SETTINGS)
@click.argument("words", metavar="REF|QUERY...", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--forget", is_flag=True, help="Leave files alone; the library forgets where they were (a scan finds them again)."
)
@click.option("--permanent", is_flag=True, help="Delete for good, without the trash. Cannot be undone.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@dry_run_option
@json_option
@pass_state
def command(
    state: State, words: tuple[str, ...], forget: bool, permanent: bool, yes: bool, dry_run: bool, as_json: bool
) -> None:
    """Put the files of the chosen artifacts into the system's trash, with their previews and sidecars.

    A path removes that file only, an id or a query every copy. What you said about a file stays in the library. hubtool undo brings
    files back out of the trash.
    """
    from hubtool.actions.library import open_store, reading
    from hubtool.actions.remove import DELETE, FORGET, TRASH, plan, remove

    if forget and permanent:
        raise UsageProblem("--forget and --permanent contradict each other")
    how = FORGET if forget else DELETE if permanent else TRASH
    with reading(state.library) as reader:
        removals = plan(reader, words, how)
    if dry_run or not as_json:
        total = sum(one.place.size for one in removals)
        if as_json:
            print_json({"how": how, "files": [one.to_json() for one in removals]})
        for one in () if as_json else removals:
            show("\n".join([one.place.path, *(f"  with {path}" for path in one.beside)]))
        say(f"{how}: {len(removals)} files, {human_size(total)}")
    if dry_run or not removals:
        return
    confirm(f"{how} {len(removals)} files?", yes)
    with open_store(state.library) as store:
        outcome = remove(store, removals, how)
    if as_json:
        print_json(outcome.to_json())
    else:
        say(
            f"{len(outcome.removed)} removed" + ("" if permanent else f"; hubtool undo {outcome.journal} takes it back")
        )
    raise_failed(outcome.failed, len(outcome.removed))
