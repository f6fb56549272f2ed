"""Hash files again and tell which are not the bytes they were."""

from __future__ import annotations

import click

from hubtool.cli.context import State, json_option, pass_state
from hubtool.cli.output import print_json, progress, say, show


@click.command()
@click.argument("refs", metavar="[REF...]", nargs=-1)
@click.option("--workers", type=click.IntRange(1, 64), help="Threads for hashing.")
@json_option
@pass_state
@click.pass_context
def command(context: click.Context, state: State, refs: tuple[str, ...], workers: int | None, as_json: bool) -> None:
    """Hash REF..., or every present file, again and compare with the library. Exit 1 if anything is missing or differs."""
    from hubtool.actions.library import open_store
    from hubtool.actions.verify import verify

    verdicts = []
    with open_store(state.library) as store:
        for verdict in verify(store, refs, workers=workers, progress=progress):
            verdicts.append(verdict)
            if verdict.status != "ok" and not as_json:
                show(f"{verdict.status}: {verdict.path}" + (f" ({verdict.message})" if verdict.message else ""))
    bad = sum(verdict.bad for verdict in verdicts)
    if as_json:
        print_json({"verified": len(verdicts), "bad": bad, "files": [verdict.to_json() for verdict in verdicts]})
    say(f"{len(verdicts)} verified, {bad} bad")
    if bad:
        context.exit(1)
