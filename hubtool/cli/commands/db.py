"""Look after the library file: upgrade, check, back up, or say where it is."""

from __future__ import annotations

from pathlib import Path

import click

from hubtool.cli.context import State, json_option, pass_state
from hubtool.cli.output import print_json, say, show
from hubtool.errors import UsageProblem


@click.group()
def command() -> None:
    """Look after the library file."""


@command.command()
@pass_state
def path(state: State) -> None:
    """Print where the library is."""
    from hubtool.actions.where import default_target

    show(default_target(state.library))


@command.command()
@json_option
@pass_state
def upgrade(state: State, as_json: bool) -> None:
    """Bring the schema up to date; a library with content is backed up first."""
    from hubtool.actions.where import default_target
    from hubtool.registry import schema
    from hubtool.registry.store import Store

    with Store.unchecked(default_target(state.library), create=True) as store:
        before, after = schema.upgrade(store.engine, store.path)
    if as_json:
        print_json({"before": before, "after": after})
    else:
        show(f"schema {after}" if before == after else f"schema {before or 'none'} -> {after}")


@command.command()
@json_option
@pass_state
@click.pass_context
def check(context: click.Context, state: State, as_json: bool) -> None:
    """Check the file, its references and its schema. Exit 1 if anything is wrong."""
    from hubtool.actions.where import default_target
    from hubtool.registry import schema
    from hubtool.registry.store import Store

    with Store.unchecked(default_target(state.library)) as store:
        result = schema.check(store.engine, store.path)
    if as_json:
        found = {"integrity": result.integrity, "foreign_keys": result.foreign_keys, "schema": result.schema}
        print_json({"ok": result.ok, **found})
    else:
        for line in (*result.integrity, *result.foreign_keys):
            show(line)
        show(f"schema {result.schema or 'none'}: " + ("ok" if result.ok else "not ok"))
    if not result.ok:
        say(
            "hubtool db upgrade"
            if result.schema != schema.HEAD
            else "a backup may help: look beside the library for *.backup-*"
        )
        context.exit(1)


@command.command()
@click.argument("target", required=False, type=click.Path(dir_okay=False))
@pass_state
def backup(state: State, target: str | None) -> None:
    """Write a consistent copy to TARGET, by default beside the library (the newest three are kept)."""
    from hubtool.actions.where import default_target
    from hubtool.registry import schema
    from hubtool.registry.store import Store

    with Store.unchecked(default_target(state.library)) as store:
        if store.path is None:
            raise UsageProblem(
                "only a library in a file can be backed up here", hint="use the tools of the database server"
            )
        show(str(schema.backup(store.engine, store.path, Path(target).absolute() if target else None)))
