"""What every command shares: the global options, and the options that mean the same everywhere.

    @click.command()
    @click.argument("query", nargs=-1)
    @format_option          # fmt: "table" | "json" | "ndjson" | "csv" | "paths"; --json is short for --format json
    @pass_state             # first argument: State
    def command(state: State, query: tuple[str, ...], fmt: str) -> None: ...

A listing command takes ``format_option``, any other reading command ``json_option`` (``as_json: bool``), a writing command
``dry_run_option`` (``dry_run: bool``) and, where it writes files, ``force_option`` (``force: bool``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

FORMATS = ("table", "json", "ndjson", "csv", "paths")

_Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class State:
    """The global options. ``library``: a path or SQLAlchemy URL, None for the default."""

    library: str | None = None
    quiet: bool = False
    verbose: int = 0


pass_state = click.make_pass_decorator(State, ensure=True)


def state() -> State:
    """The state of the running command; the default one outside of any."""
    context = click.get_current_context(silent=True)
    found = context.find_object(State) if context else None
    return found or State()


def json_option(function: _Function) -> _Function:
    """Add ``--json``: one JSON document on stdout. Parameter ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(function)


def format_option(function: _Function) -> _Function:
    """Add ``--format`` and its short form ``--json``. Parameter ``fmt``. Not to be combined with ``json_option``."""
    function = click.option("--json", "fmt", flag_value="json", help="Short for --format json.")(function)
    return click.option(
        "--format", "fmt", type=click.Choice(FORMATS), default="table", show_default=True, help="How to print the rows."
    )(function)


def dry_run_option(function: _Function) -> _Function:
    """Add ``--dry-run``: print what would be done, write nothing. Parameter ``dry_run``."""
    return click.option("--dry-run", is_flag=True, help="Print what would be done, write nothing.")(function)


def force_option(function: _Function) -> _Function:
    """Add ``--force``: overwrite existing outputs. Parameter ``force``."""
    return click.option("--force", is_flag=True, help="Overwrite an existing output.")(function)
