"""Show where hubtool keeps its things, and which extras are installed."""

from __future__ import annotations

import os
from typing import Any

import click
from platformdirs import user_data_path

from hubtool.cli.commands.version import installed
from hubtool.cli.context import State, json_option, pass_state
from hubtool.cli.output import print_json, show, table
from hubtool.hub.header_cache import cache_folder
from hubtool.version import __version__

_EXTRAS = {"torch": "torch", "diffusers": "diffusers", "hub": "huggingface_hub", "hash": "blake3"}


@click.group()
def command() -> None:
    """Show where hubtool keeps its things, and which extras are installed."""


@command.command("path")
@pass_state
def path(state: State) -> None:
    """Print where the library is."""
    show(library(state)[0])


@command.command("list")
@json_option
@pass_state
def list_(state: State, as_json: bool) -> None:
    """Print every setting with its origin."""
    doc = settings(state)
    if as_json:
        print_json(doc)
        return
    rows = [(name, str(value)) for name, value in doc.items() if name != "extras"]
    rows += [(f"extra {name}", found or "not installed") for name, found in doc["extras"].items()]
    show(table(rows))


def settings(state: State) -> dict[str, Any]:
    """The settings in force."""
    place, origin = library(state)
    return {
        "version": __version__,
        "library": place,
        "library_from": origin,
        "data": str(user_data_path("hubtool")),
        "cache": str(cache_folder()),
        "extras": {extra: installed(package) for extra, package in _EXTRAS.items()},
    }


def library(state: State) -> tuple[str, str]:
    """Path or URL of the library (a password in it is hidden), and what set it."""
    from hubtool.actions.where import default_target

    named = "HUBTOOL_LIBRARY" if os.environ.get("HUBTOOL_LIBRARY") else "default"
    return _without_password(default_target(state.library)), "--library" if state.library else named


def _without_password(place: str) -> str:
    scheme, mark, rest = place.partition("://")
    user, at, host = rest.rpartition("@")
    return f"{scheme}{mark}{user.partition(':')[0]}:***@{host}" if at and ":" in user else place
