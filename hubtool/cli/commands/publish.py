"""Publish artifacts to a hub in one commit, with a card that keeps a person's own text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from hubtool.cli import output
from hubtool.cli.amounts import human_size
from hubtool.cli.context import State, dry_run_option, json_option, pass_state
from hubtool.cli.publishing import describing_options, said_of

_SHOWN = 20


@click.command(
    epilog="""\b
Examples:
  hubtool publish style.safetensors me/style --trigger "sks dog" --strength 0.8
  hubtool publish style.safetensors style-000010.safetensors me/style --dry-run
  hubtool publish style.safetensors someone/style --pr
"""
)
@click.argument("refs", nargs=-1, required=True, metavar="REF...")
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="Make a new repository public; it is private otherwise.")
@click.option("--pr", "pull_request", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--revision", default="main", show_default=True, help="Branch to commit to; made from main if need be.")
@click.option("--message", "-m", help="Title of the commit.")
@click.option(
    "--layout", "layouts", multiple=True, help="Add the first REF in this layout too (kohya, comfy, peft ...)."
)
@click.option("--keep-original", is_flag=True, help="Add the first REF as it was, where it had to be converted.")
@click.option(
    "--preview",
    "previews",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="A picture for the gallery.",
)
@click.option("--prune", is_flag=True, help="Delete what an earlier publication put there and this one has not.")
@click.option("--keep-metadata", is_flag=True, help="Publish paths and user names in metadata as they are.")
@click.option("--drop-metadata", multiple=True, metavar="KEY", help="Leave this metadata key out.")
@click.option("--permitted", is_flag=True, help="You may publish it although its permissions on Civitai forbid that.")
@click.option(
    "--try",
    "try_base",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Run the card's snippet first, with this pipeline folder as the base.",
)
@click.option("--offline", is_flag=True, help="With --dry-run: plan against the last receipt in the library.")
@describing_options
@dry_run_option
@json_option
@pass_state
def command(state: State, /, refs: tuple[str, ...], repo: str, as_json: bool, **asked: Any) -> None:
    """Publish REF... to OWNER/NAME; the first REF gets the name under which diffusers and PEFT load it without arguments.

    One commit or nothing. Further REFs go to epochs/, variants/ or a folder of their layout. Publishing twice makes no second commit.
    """
    from hubtool.actions.publish import publish
    from hubtool.actions.publish_result import Options

    said = said_of(asked)
    with output.progress(f"publishing to {repo}"):
        done = publish(refs, repo, said, Options(**asked, library=state.library))
    if as_json:
        output.print_json(done.to_json())
    else:
        _describe(done, asked["dry_run"])
    for warning in done.warnings:
        output.complain(warning, "warning")
    if done.refused:
        click.get_current_context().exit(1)


def _describe(done: Any, dry_run: bool) -> None:
    counts = Counter(change.action for change in done.changes)
    told = ", ".join(f"{counts[name]} {text}" for name, text in _ACTIONS.items() if counts[name])
    output.show(f"{done.repo} ({done.visibility or 'visibility unknown'}): {told}")
    rows = [change for change in done.changes if change.action != "keep"]
    for change in rows[:_SHOWN]:
        digest = (change.sha256 or change.before or "")[:12]
        output.show(f"  {change.action:6} {change.path}  {human_size(change.size)}  {digest}")
    if len(rows) > _SHOWN:
        output.show(f"  ... {len(rows) - _SHOWN} more")
    for finding in done.findings:
        output.complain(finding.message, finding.severity if finding.severity != "info" else "note")
    if done.kept:
        output.show(f"  left as a person wrote it: {', '.join(done.kept)}")
    if dry_run:
        output.show(done.card_diff.rstrip())
        output.show("(dry run: nothing was sent)")
    else:
        output.show(f"{'committed' if done.created else 'nothing to commit'}: {done.url} at {done.commit[:12]}")


_ACTIONS = {"add": "added", "change": "changed", "delete": "deleted", "keep": "kept"}
