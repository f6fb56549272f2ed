"""Record that a file of the library is a file of a hub, after comparing hashes."""

from __future__ import annotations

import click

from hubtool.cli.context import State, dry_run_option, json_option, pass_state
from hubtool.cli.output import print_json, progress, say, show
from hubtool.errors import UsageProblem


@click.command()
@click.argument("refs", metavar="REF [REPO]", nargs=-1)
@click.option("--civitai", is_flag=True, help="Look REF... (all files, without REF) up on Civitai by hash.")
@click.option(
    "--edited", is_flag=True, help="With --civitai: also find files whose header was edited, one request each."
)
@click.option("--refresh", is_flag=True, help="With --civitai: ask again for what was answered before.")
@dry_run_option
@json_option
@pass_state
def command(
    state: State, refs: tuple[str, ...], civitai: bool, edited: bool, refresh: bool, dry_run: bool, as_json: bool
) -> None:
    """Tie the artifact REF to the file of REPO (owner/name[@revision][/file]) that has the same bytes.

    Only hashes are compared; nothing is downloaded. Civitai is asked only with --civitai, and is sent hashes only.
    """
    if civitai:
        _look_up(state, refs, edited, refresh, dry_run, as_json)
        return
    if len(refs) != 2:
        raise UsageProblem("give an artifact and a repository", hint="hubtool link style.safetensors owner/name")
    from hubtool.actions.library import open_store
    from hubtool.actions.link import link

    with open_store(state.library) as store:
        linked = link(store, *refs, dry_run=dry_run)
    if as_json:
        print_json(linked.to_json())
    else:
        show(
            f"{linked.row.id} {'is' if linked.recorded else 'would be'} {linked.origin.ref} ({linked.origin.commit[:12]})"
        )


def _look_up(state: State, refs: tuple[str, ...], edited: bool, refresh: bool, dry_run: bool, as_json: bool) -> None:
    from hubtool.actions.civitai import look_up, plan
    from hubtool.actions.library import open_store, reading

    if dry_run:
        with reading(state.library) as reader:
            wanted = plan(reader, refs, refresh=refresh)
        print_json({"would_ask": len(wanted)}) if as_json else show(f"would ask about {len(wanted)} hashes")
        return
    with open_store(state.library) as store, progress("Asking Civitai") as advance:
        found = look_up(store, refs, edited=edited, refresh=refresh, progress=advance)
    if as_json:
        print_json(found.to_json())
    else:
        show("  ".join(f"{name} {count}" for name, count in found.counts.items()))
        for one in found.found:
            if one.facts is not None and one.status == "known":
                say(f"{one.row.id}: {one.facts.name} {one.facts.version} {one.facts.page}")
    found.raise_failure()
