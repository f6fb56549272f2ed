"""The ``hubtool`` command: global options, commands found by file name, endings.

A command's module is imported when it runs, not before: ``hubtool --help`` reads the first docstring line of each file as text.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import click

from hubtool.cli.context import State
from hubtool.cli.errors import ENDINGS, EXIT_CODES, TERMINATED, report, wants_json
from hubtool.version import __version__

_COMMANDS = Path(__file__).parent / "commands"
_SUMMARY_BYTES = 400  # enough for a first line
_COLLECT = (
    50_000,
    20,
    50,
)  # modules and tables make objects that stay: looking for garbage among them is a sixth of torch's import


class Commands(click.Group):
    """A group whose commands are the files of ``hubtool/cli/commands``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_modules())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = _modules().get(cmd_name)
        if module is None:
            return None
        command: click.Command = import_module(f"hubtool.cli.commands.{module.stem}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _modules():
            near = get_close_matches(args[0], _modules(), n=1, cutoff=0.5)
            ctx.fail(f"no such command: {args[0]}" + (f"; did you mean {near[0]}?" if near else ""))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _summary(path)) for name, path in sorted(_modules().items())])

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        args = list(sys.argv[1:] if args is None else args)
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        try:
            ended = super().main(args, prog_name, complete_var, False, **extra)
        except ENDINGS as error:
            sys.exit(report(error, wants_json(args)))
        sys.exit(ended if isinstance(ended, int) else 0)


def _modules() -> dict[str, Path]:
    """Commands by name; a trailing ``_`` in a file name only keeps it from being a keyword (``import_.py``)."""
    return {path.stem.rstrip("_").replace("_", "-"): path for path in _COMMANDS.glob("[a-z]*.py")}


def _summary(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        first = file.read(_SUMMARY_BYTES).split("\n", 1)[0]
    return first.strip('"').rstrip(".")


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog="Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
)
@click.option(
    "--library", metavar="PATH|URL", help="The library: an SQLite file or a SQLAlchemy URL. Default: HUBTOOL_LIBRARY."
)
@click.option("-q", "--quiet", is_flag=True, help="No talk on stderr; errors stay.")
@click.option("-v", "--verbose", count=True, help="More talk on stderr.")
@click.version_option(__version__, "--version", "-V", message="hubtool %(version)s")
@click.pass_context
def cli(context: click.Context, library: str | None, quiet: bool, verbose: int) -> None:
    """Know, convert, merge, catalogue and share adapters for diffusion pipelines."""
    context.obj = State(library, quiet, verbose)


def main() -> None:
    """Run the command line and exit. SIGTERM unwinds like an exception, so that half-written outputs are removed."""
    signal.signal(signal.SIGTERM, _terminate)
    gc.set_threshold(*_COLLECT)
    try:
        cli.main(prog_name="hubtool")
    except SystemExit as ending:
        _leave_at_once(ending.code)
        raise


def _leave_at_once(code: Any) -> None:
    """End the process without taking torch apart, which takes as long as half of its import; other endings are short by themselves."""
    busy = any(not thread.daemon for thread in threading.enumerate() if thread is not threading.current_thread())
    if "torch" not in sys.modules or not isinstance(code, int) or busy:
        return
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):  # the ordinary ending says that nobody reads, or that a disk is full
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(TERMINATED)
