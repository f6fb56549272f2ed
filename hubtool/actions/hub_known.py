"""What the library knows about an artifact from hubs, for ``show``: where it came from and went to, its cards, Civitai's answer. No network."""

from __future__ import annotations

from typing import Any

from hubtool.actions import civitai
from hubtool.actions.dates import rfc3339
from hubtool.errors import MissingExtra
from hubtool.registry import hub_facts
from hubtool.registry.hub_facts import Card, Origin
from hubtool.registry.records import Reader, Row


def hub_known(reader: Reader, row: Row) -> dict[str, Any]:
    """``origins`` (the newest last), ``cards`` of their repositories, and ``civitai`` (None where it never answered)."""
    origins = hub_facts.origins(reader, artifact=row.key)
    places = dict.fromkeys((origin.endpoint, origin.repo) for origin in origins)
    cards = [card for place in places if (card := hub_facts.card(reader, *place)) is not None]
    return {
        "origins": [_origin(one) for one in origins],
        "cards": [_card(one) for one in cards],
        "civitai": _civitai(reader, row),
    }


def _origin(origin: Origin) -> dict[str, Any]:
    names = ("how", "endpoint", "repo", "revision", "commit", "path", "sha256", "etag", "size")
    return {"ref": origin.ref, **{name: getattr(origin, name) for name in names}, "at": rfc3339(origin.at)}


def _card(card: Card) -> dict[str, Any]:
    names = ("endpoint", "repo", "commit", "license", "license_name", "license_link", "relation")
    lists = {"base_models": list(card.base_models), "trigger_words": list(card.trigger_words)}
    return {**{name: getattr(card, name) for name in names}, **lists, "at": rfc3339(card.at)}


def _civitai(reader: Reader, row: Row) -> dict[str, Any] | None:
    try:
        said = civitai.known(reader, row)
    except MissingExtra:  # without nh3 its HTML stays unread
        return None
    return said.to_json() if said else None
