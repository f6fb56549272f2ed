"""Write the model card of an artifact, or check one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hubtool.cli import output
from hubtool.cli.context import State, dry_run_option, json_option, pass_state
from hubtool.cli.publishing import describing_options, said_of
from hubtool.types import Finding


@click.command(
    epilog="""\b
Examples:
  hubtool card style.safetensors --repo me/style -o README.md
  hubtool card README.md
  hubtool card hf://me/style
"""
)
@click.argument("ref", metavar="REF")
@click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path, dir_okay=False), help="Write or update this file."
)
@click.option("--repo", metavar="OWNER/NAME", help="Where it will be published: for links and the snippet.")
@describing_options
@dry_run_option
@json_option
@pass_state
def command(
    state: State, /, ref: str, out: Path | None, repo: str | None, dry_run: bool, as_json: bool, **asked: Any
) -> None:
    """Write the card of the artifact REF; check REF where it is a card (README.md, hf://owner/name).

    A card that is there keeps what a person wrote. Exit code 1: the Hub would refuse the card.
    """
    from hubtool.actions.card import check_card, is_card, write_card
    from hubtool.actions.publish_result import Options

    said = said_of(asked)
    done: Any = (
        check_card(ref)
        if is_card(ref)
        else write_card(ref, out, repo=repo, said=said, options=Options(dry_run=dry_run, library=state.library))
    )
    if as_json:
        output.print_json(done.to_json())
    elif is_card(ref):
        output.show(f"{ref}: {'the Hub accepts it' if done.ok else 'the Hub would refuse it'}")
    elif out is None:
        output.show(done.text.rstrip())
    else:
        output.show(done.diff.rstrip() if dry_run else f"{out}: {'written' if done.changed else 'nothing to change'}")
    _tell(done.findings)
    if any(finding.severity == "error" for finding in done.findings):
        click.get_current_context().exit(1)


def _tell(findings: tuple[Finding, ...]) -> None:
    for finding in findings:
        output.complain(finding.message, finding.severity if finding.severity != "info" else "note")
