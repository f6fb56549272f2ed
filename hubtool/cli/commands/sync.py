"""Bring hub and library together: pull what is newer there, publish what changed here."""

from __future__ import annotations

from typing import Any

import click

from hubtool.cli.context import State, dry_run_option, json_option, pass_state
from hubtool.cli.output import listing, print_json, progress, say


@click.command()
@click.argument("refs", metavar="[REF...]", nargs=-1)
@click.option("--pull", "pulling", is_flag=True, help="Replace files here by the newer ones of their hub.")
@click.option("--publish", "publishing", is_flag=True, help="Publish again what was published and edited since.")
@click.option(
    "--civitai/--no-civitai",
    default=None,
    help="Also ask Civitai about files by hash. Default: HUBTOOL_CIVITAI, else not.",
)
@dry_run_option
@json_option
@pass_state
def command(
    state: State,
    refs: tuple[str, ...],
    pulling: bool,
    publishing: bool,
    civitai: bool | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Compare with the hubs and print the plan; carry out of it what --pull and --publish allow.

    A file that changed on both sides is never touched, nor is one that was edited after the last scan.
    """
    from hubtool.actions import sync
    from hubtool.actions.library import open_store
    from hubtool.actions.outdated import outdated, raise_failures
    from hubtool.hub.civitai import enabled

    with progress("Asking") as advance:
        found = outdated(state.library, refs, progress=advance)
    steps = sync.plan(found)
    if not dry_run and steps:
        with open_store(state.library) as store, progress("Syncing", len(steps)) as advance:
            sync.carry_out(store, steps, pull=pulling, publish=publishing, library=state.library, progress=advance)
    looked_up = _civitai(state, refs, dry_run) if (enabled() if civitai is None else civitai) else None
    _print(steps, looked_up, as_json)
    sync.raise_failures(steps)
    raise_failures(found)
    if looked_up is not None and not dry_run:
        looked_up.raise_failure()


def _civitai(state: State, refs: tuple[str, ...], dry_run: bool) -> Any:
    from hubtool.actions.civitai import Lookup, look_up, plan
    from hubtool.actions.library import open_store, reading

    if dry_run:
        with reading(state.library) as reader:
            return Lookup(asked=len(plan(reader, refs)))
    with open_store(state.library) as store, progress("Asking Civitai") as advance:
        return look_up(store, refs, progress=advance)


def _print(steps: list[Any], looked_up: Any, as_json: bool) -> None:
    rows = [step.to_json() for step in steps]
    if as_json:
        print_json({"steps": rows, "civitai": looked_up.to_json() if looked_up else None})
        return
    from hubtool.actions.sync import COLUMNS

    listing(rows, COLUMNS, "table")
    waiting = sorted({step.action for step in steps if step.state == "planned" and step.action in ("pull", "publish")})
    for action in waiting:
        say(f"planned only: hubtool sync --{action} does it")
    if not rows:
        say("nothing to do")
    if looked_up is not None:
        counts = "  ".join(f"{name} {count}" for name, count in looked_up.counts.items())
        say(f"Civitai: asked about {looked_up.asked}  {counts}")
