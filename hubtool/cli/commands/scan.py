"""Index folders and files: what is new, changed, moved or gone; hashes follow."""

from __future__ import annotations

import click

from hubtool.cli.amounts import human_size
from hubtool.cli.context import State, json_option, pass_state
from hubtool.cli.output import listing, print_json, progress, say, show
from hubtool.errors import PartialFailure, UsageProblem
from hubtool.hub.refs import is_hub_ref

_MOST_PROBLEMS = 20


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1)
@click.option("--workers", type=click.IntRange(1, 64), help="Threads for reading and hashing.")
@click.option("--no-hash", is_flag=True, help="Read headers only; a later scan computes the hashes.")
@click.option(
    "--accept-missing", is_flag=True, help="Believe that most files of a folder are gone, not that its disk is offline."
)
@click.option("--refresh", is_flag=True, help="Of hf:// references: read headers again that were read before.")
@json_option
@pass_state
def command(
    state: State, paths: tuple[str, ...], workers: int | None, no_hash: bool, accept_missing: bool, refresh: bool, as_json: bool
) -> None:  # fmt: skip
    """Bring the library up to date with PATH..., or with every folder scanned before.

    Nothing is written into the folders. Interrupt it at any time: the next scan goes on. PATH may be hf://owner/name: then the weights of
    that repository are listed from their headers, nothing is downloaded, and what the library has already is tied to it.
    """
    if any(is_hub_ref(path) for path in paths):
        _remote(state, paths, refresh, as_json)
        return
    from hubtool.actions.library import open_store
    from hubtool.actions.scan import scan

    with open_store(state.library) as store:
        result = scan(
            store, paths, hashes=not no_hash, workers=workers, accept_missing=accept_missing, progress=progress
        )
    if as_json:
        print_json(result.to_json())
    else:
        names = ("added", "changed", "moved", "missing", "unchanged")
        counts = [f"{name} {getattr(result, name)}" for name in names]
        show("  ".join([*counts, f"problems {len(result.problems)}"]))
        for problem in result.problems[:_MOST_PROBLEMS]:
            say(f"{problem['path']}: {problem['message']}")
        if len(result.problems) > _MOST_PROBLEMS:
            say(f"... and {len(result.problems) - _MOST_PROBLEMS} more: hubtool ls is:corrupt")
        for root in result.offline:
            say(f"{root} is offline: its files stay in the library (if they are really gone: --accept-missing)")
    if result.failed:
        raise PartialFailure(f"cannot be read: {', '.join(result.failed)}")


def _remote(state: State, paths: tuple[str, ...], refresh: bool, as_json: bool) -> None:
    from hubtool.actions.remote import COLUMNS, index_remote

    if not all(is_hub_ref(path) for path in paths):
        raise UsageProblem(
            "folders and repositories are scanned by commands of their own", hint="hubtool scan hf://owner/name"
        )
    indexes = [index_remote(path, state.library, refresh=refresh) for path in paths]
    documents = [index.to_json() for index in indexes]
    if as_json:
        print_json(documents[0] if len(documents) == 1 else documents)
    for index in [] if as_json else indexes:
        listing([file.row() for file in index.files], COLUMNS, "table")
        say(f"{index.repo} at {index.commit[:12]}: {human_size(index.received)} were read, nothing was downloaded")
    broken = [file for index in indexes for file in index.files if file.error is not None]
    for file in broken:
        say(f"{file.ref}: {file.error}")
    if broken:
        raise PartialFailure(f"{len(broken)} files could not be read")
