"""Fetch files from a hub: verified, resumed where they stopped, indexed with their origin."""

from __future__ import annotations

import time
from pathlib import Path

import click

from hubtool.actions.pull import pull, raise_failed
from hubtool.actions.pull_result import Item, Options, Pulled
from hubtool.cli import output
from hubtool.cli.amounts import human_size
from hubtool.cli.context import State, dry_run_option, force_option, json_option, pass_state
from hubtool.hub.client import Client

_SILENTLY = 8.0  # seconds of waiting that need no word

_HOW = {
    "download": "would download", "copy": "would copy", "present": "is there", "library": "is in the library", "copied": "copied",
    "http": "downloaded", "xet": "downloaded (xet)", "failed": "failed",
}  # fmt: skip


@click.command(
    epilog="""\b
Examples:
  hubtool pull hf://owner/name
  hubtool pull owner/name -o loras/
  hubtool pull hf://owner/name@v1.0/style.safetensors -o loras/
  hubtool pull hf://owner/name/epochs --dry-run
  hubtool pull owner/name --include '*.safetensors' --exclude 'epochs/*'
"""
)
@click.argument("refs", metavar="REF...", nargs=-1, required=True)
@click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the files. Default: owner/name in the library's folder.",
)  # fmt: skip
@click.option("--include", multiple=True, metavar="PATTERN", help="Only files whose path matches; repeatable.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="No files whose path matches; repeatable.")
@click.option("--no-index", is_flag=True, help="Leave the library alone.")
@force_option
@dry_run_option
@json_option
@pass_state
def command(
    state: State, refs: tuple[str, ...], out: Path | None, include: tuple[str, ...], exclude: tuple[str, ...], no_index: bool,
    force: bool, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Fetch each REF: hf://owner/name[@revision][/file or folder], plain owner/name, or an address of the web site.

    Every file is checked against the hash that the hub lists. Interrupt it at any time: the same command goes on where it stopped.
    """
    options = Options(out, include, exclude, force, dry_run, not no_index, state.library)
    results = pull(refs, options, client=Client(sleep=_wait), progress=output.progress)
    if sum(len(result.items) for result in results) == 1:
        raise_failed(results)
    documents = [result.to_json() for result in results]
    if as_json:
        output.print_json(documents[0] if len(documents) == 1 else documents)
    for result in results:
        if not as_json:
            _describe(result)
        for warning in result.warnings:
            output.complain(warning, "warning")
    _complain([item for result in results for item in result.failed])
    raise_failed(results)


def _wait(seconds: float) -> None:
    if seconds > _SILENTLY:
        output.say(f"the hub asks to wait {seconds:.0f} seconds")
    time.sleep(seconds)


def _describe(result: Pulled) -> None:
    output.show(f"{result.ref} at {result.commit[:12]}")
    for item in result.items:
        size = human_size(item.entry.size)
        extra = f", {human_size(item.resumed)} were there from an earlier run" if item.resumed else ""
        output.show(f"  {_HOW[item.how]}: {item.target} ({size}{extra})")
    for path, reason in result.left_out.items():
        output.say(f"  left out: {path} ({reason})")


def _complain(failed: list[Item]) -> None:
    for item in failed:
        if item.error is not None:
            output.complain(f"{item.entry.path}: {item.error.message}", "error")
            if item.error.hint:
                output.complain(item.error.hint, "hint")
