"""Show everything the library knows about one artifact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from hubtool.cli.context import State, json_option, pass_state
from hubtool.cli.facts import facts
from hubtool.cli.output import clean, print_json, show

_MOST_LINES = 12
_SIDES = {"parents": "made by", "children": "made into, by"}


@click.command()
@click.argument("ref")
@json_option
@pass_state
def command(state: State, ref: str, as_json: bool) -> None:
    """Show the artifact that REF names: a path, an id or its beginning, or at least 6 digits of a hash."""
    from hubtool.actions import catalogue
    from hubtool.actions.library import reading

    with reading(state.library) as reader:
        document = catalogue.show(reader, ref)
    if as_json:
        print_json(document)
        return
    show(facts(document))
    for line in _library_lines(document):
        show(line)


def _library_lines(document: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield f"id {document['id']}  added {document['added']}"
    for place in document["locations"]:
        yield f"{place['state']}: {place['path']}"
    for origin, hashes in document["hashes_by_origin"].items():
        if origin != "computed":
            yield from (f"{origin} {name}: {value}" for name, value in hashes.items())
    for side, edges in document["lineage"].items():
        yield from (
            f"{side.removesuffix('s').replace('ren', '')}: {edge['op']} {edge['id'] or ''} {edge['ref'] or ''}"
            for edge in edges
        )
    if document["tags"]:
        yield f"tags: {', '.join(document['tags'])}"
    yield from (f"{name}: {value}" for name, value in document["user"].items() if value)
    yield from map(clean, _hub_lines(document["hub"]))


def _hub_lines(hub: Mapping[str, Any]) -> Iterator[str]:
    """What hubs said: strangers' words, so without anything that steers a terminal."""
    for origin in hub["origins"]:
        yield f"{origin['how']}: {origin['ref']} at {origin['commit'][:12]}"
    for card in hub["cards"]:
        bases = f", {card['relation'] or 'made'} of {', '.join(card['base_models'])}" if card["base_models"] else ""
        yield f"card of {card['repo']}: license {card['license_name'] or card['license'] or 'unknown'}{bases}"
    if hub["civitai"]:
        yield from _civitai_lines(hub["civitai"])


def _civitai_lines(said: Mapping[str, Any]) -> Iterator[str]:
    proven = "" if said["match"] else " (not proven to be this file)"
    yield f"Civitai: {said['name']} {said['version'] or ''} {said['page'] or ''}{proven}"
    lines = said["description"].splitlines()
    yield from (f"  {line}" for line in lines[:_MOST_LINES])
    if len(lines) > _MOST_LINES:
        yield f"  ... {len(lines) - _MOST_LINES} more lines: --json has them"
