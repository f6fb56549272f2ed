"""How commands that change user data and files print what they do, and how they ask."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from hubtool.cli.output import print_json, say, show
from hubtool.errors import HubtoolError, PartialFailure, UsageProblem

if TYPE_CHECKING:
    from hubtool.registry.curation import Change

# Words such as -todo and -kind:vae are arguments. Commands that take them have no short options: click would find -y in -style.
QUERY_SETTINGS = {"ignore_unknown_options": True, "help_option_names": ["--help"]}
_MOST = 20


def print_changes(changes: Sequence[Change], dry_run: bool, as_json: bool) -> None:
    """What an edit did, or would do, to the user data of artifacts."""
    if as_json:
        rows = [{"id": one.uid, "before": one.before.to_json(), "after": one.after.to_json()} for one in changes]
        print_json({"changed": len(changes), "dry_run": dry_run, "changes": rows})
        return
    for one in changes[:_MOST]:
        before, after = one.before.to_json(), one.after.to_json()
        told = (
            f"{name}: {_shown(before[name])} -> {_shown(after[name])}" for name in after if before[name] != after[name]
        )
        show(f"{one.uid}  {'; '.join(told)}")
    if len(changes) > _MOST:
        say(f"... and {len(changes) - _MOST} more")
    say(
        f"{len(changes)} {'would change' if dry_run else 'changed'}"
        + ("" if dry_run or not changes else "; hubtool undo takes it back")
    )


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def confirm(question: str, yes: bool) -> None:
    """Ask before files are touched. Raises UsageProblem where nobody can answer and ``--yes`` was not given, click.Abort for a no."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageProblem("nobody is here to confirm this", hint="--dry-run shows the plan, --yes carries it out")
    click.confirm(question, abort=True, err=True)


def raise_failed(failed: Mapping[str, HubtoolError], done: int) -> None:
    """Raise the one failure, or PartialFailure where something else was done or failed too."""
    if not failed:
        return
    if len(failed) == 1 and not done:
        raise next(iter(failed.values()))
    told = "; ".join(f"{path}: {error.message}" for path, error in list(failed.items())[:_MOST])
    raise PartialFailure(f"{len(failed)} files could not be dealt with: {told}")
