"""Options that describe a publication, shared by ``publish`` and ``card``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from hubtool.actions.publish_facts import Said

_Function = Callable[..., Any]
_OPTIONS = (
    click.option("--title", help="Title of the card."),
    click.option("--trigger", "words", multiple=True, metavar="WORDS", help="A trigger word or phrase."),
    click.option("--strength", type=click.FloatRange(-10, 10), help="Recommended strength."),
    click.option("--base-model", "base_models", multiple=True, metavar="ID", help="Base model on the Hub."),
    click.option(
        "--relation",
        type=click.Choice(("adapter", "finetune", "merge", "quantized")),
        help="Relation to the base model.",
    ),
    click.option(
        "--license", "licence", metavar="ID", help="Licence id of the Hub (openrail++, apache-2.0, other ...)."
    ),
    click.option("--license-name", "licence_name", help="Name of a licence that is other."),
    click.option("--license-link", "licence_link", help="Its text: a URL or a file of the repository."),
    click.option("--tag", "tags", multiple=True, help="A further tag."),
    click.option("--family", help="Family of the base, where the file cannot tell."),
    click.option("--nsfw", is_flag=True, help="Mark as not for all audiences."),
)
_NAMES = (
    "title", "words", "strength", "base_models", "relation", "licence", "licence_name", "licence_link", "tags", "family", "nsfw",
)  # fmt: skip


def describing_options(function: _Function) -> _Function:
    """Add every option that says something about the publication."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def said_of(asked: dict[str, Any]) -> Said:
    """Take those options out of ``asked``."""
    from hubtool.actions.publish_facts import Said as Made

    return Made(**{name: asked.pop(name) for name in _NAMES})
