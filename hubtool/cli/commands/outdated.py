"""Compare what came from hubs, or went there, with what the hubs have now."""

from __future__ import annotations

import click

from hubtool.cli.context import State, format_option, pass_state
from hubtool.cli.output import listing, progress, say


@click.command()
@click.argument("refs", metavar="[REF...]", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Also list what is up to date.")
@format_option
@pass_state
def command(state: State, refs: tuple[str, ...], everything: bool, fmt: str) -> None:
    """List files whose hub has something else: changed, moved, deleted or gone; or that were edited here since.

    Without REF: every artifact that was pulled, published or linked. Nothing is downloaded. `hubtool sync` acts on it.
    """
    from hubtool.actions.outdated import COLUMNS, outdated, raise_failures

    with progress("Asking") as advance:
        found = outdated(state.library, refs, progress=advance)
    shown = [one for one in found if everything or one.outdated]
    listing([one.to_json() for one in shown], COLUMNS, fmt)
    if not found:
        say("nothing in the library is tied to a hub: hubtool pull, publish or link does that")
    else:
        say(f"{len(found)} compared, {sum(one.outdated for one in found)} differ")
    raise_failures(found)
