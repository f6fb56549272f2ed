"""How a command ends: every exception that is no bug becomes a message on stderr (or JSON on stdout) and an exit code."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import click

from hubtool.cli.output import complain, print_json
from hubtool.errors import FileError, HubtoolError, PartialFailure, UsageProblem

INTERRUPTED = 130
TERMINATED = 143

EXIT_CODES = {
    0: "ok",
    1: "failed, or a check found problems",
    2: "usage",
    3: "some items failed, they are listed",
    5: "library locked",
    6: "network or hub",
    7: "unsafe or corrupt input",
    INTERRUPTED: "interrupted",
}

# What a command may end with besides click's own exits. Anything else is a bug and keeps its traceback.
ENDINGS = (HubtoolError, click.ClickException, click.Abort, OSError, MemoryError)


def wants_json(args: Sequence[str]) -> bool:
    """Whether the command line asks for JSON. Read from the raw arguments: a usage error comes before they are parsed."""
    options = list(args[: args.index("--")]) if "--" in args else list(args)
    followed = {f"{name} {value}" for name, value in pairwise(options)}
    return "--json" in options or "--format=json" in options or "--format json" in followed


def report(error: BaseException, as_json: bool) -> int:
    """Print what went wrong and return the exit code."""
    if isinstance(error, click.Abort):
        return _aborted(error)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return error.exit_code
    known = as_hubtool_error(error)
    if as_json and not isinstance(known, PartialFailure):  # a partial result was printed already, with its failures
        print_json({"error": known.to_json()})
    _complain(known)
    return known.exit_code


def as_hubtool_error(error: BaseException) -> HubtoolError:
    """``error`` as a member of hubtool's own tree."""
    if isinstance(error, HubtoolError):
        return error
    if isinstance(error, click.ClickException):
        return _from_click(error)
    if isinstance(error, OSError):
        return FileError(error.strerror or str(error), path=os.fsdecode(error.filename) if error.filename else None)
    return HubtoolError("not enough memory")


def _from_click(error: click.ClickException) -> HubtoolError:
    context: click.Context | None = getattr(error, "ctx", None)
    hint = f"{context.command_path} --help" if context else None
    kind = UsageProblem if error.exit_code == 2 else HubtoolError
    return kind(error.format_message(), hint=hint)


def _aborted(error: click.Abort) -> int:
    if isinstance(error.__cause__, KeyboardInterrupt):
        complain("interrupted")
        return INTERRUPTED
    complain("aborted")
    return 1


def _complain(error: HubtoolError) -> None:
    complain(describe(error), heading="error")
    if error.hint:
        complain(error.hint, heading="hint")


def describe(error: HubtoolError) -> str:
    """The message and where it happened: ``header ends early (a.safetensors, offset 8)``."""
    offset = None if error.offset is None else f"offset {error.offset}"
    where: list[Any] = [part for part in (error.path, offset) if part and part not in error.message]
    return f"{error.message} ({', '.join(where)})" if where else error.message
