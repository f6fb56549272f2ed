"""What ``pull`` leaves in the library: the files as artifacts, where they came from, and what their repository's card says."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubtool.actions.library import open_store
from hubtool.actions.pull_result import Item, Pulled
from hubtool.errors import HubtoolError

if TYPE_CHECKING:
    from hubtool.hub.client import Client
    from hubtool.registry.hub_facts import Card
    from hubtool.registry.store import Store

MAX_CARD = 2 << 20


def record(client: Client, result: Pulled, library: str | None) -> None:
    """Index what came, note its origin, keep the facts of the card. What cannot be told is a warning of ``result``."""
    from hubtool.actions.scan import scan
    from hubtool.registry.hub_store import record_card

    there = [item for item in result.items if item.error is None]
    if not there:
        return
    card = _card(client, result)
    with open_store(library) as store:
        paths = list(dict.fromkeys(str(_artifact(item.target)) for item in there if _is_weights(item.target)))
        scanned = scan(store, paths)
        result.warnings += [f"{problem['path']}: {problem['message']}" for problem in scanned.problems]
        keys = dict(_artifacts(store, there))
        for item in there:
            if item.target in keys:
                _record_origin(store, keys[item.target], item, result)
        if card is not None:
            record_card(store, card, sorted(set(keys.values())))


def _is_weights(path: Path) -> bool:
    from hubtool.actions.scan_walk import EXTENSIONS

    extension = os.fsencode(path.suffix.lower())
    return path.name.endswith(".safetensors.index.json") or (extension in EXTENSIONS and extension != b".png")


def _artifact(path: Path) -> Path:
    """The folder that is one artifact together with a file of it, or the file."""
    from hubtool.actions.scan_walk import is_bundle

    for folder in list(path.parents)[:2]:
        if is_bundle(os.fsencode(folder)):
            return folder
    return path


def _artifacts(store: Store, items: Sequence[Item]) -> Iterator[tuple[Path, int]]:
    """(target, key of its artifact) of the items that the library now has; gives each item its id."""
    from hubtool.registry import browse
    from hubtool.registry.text import raw_path

    for item in items:
        place = (
            browse.at_path(store, raw_path(os.path.abspath(_artifact(item.target))))
            if _is_weights(item.target)
            else None
        )
        if place is not None:
            item.id = browse.by_key(store, place.artifact_id).id
            yield item.target, place.artifact_id


def _record_origin(store: Store, key: int, item: Item, result: Pulled) -> None:
    from hubtool.registry.hub_store import Origin, record_origin

    entry = item.entry
    place = (result.endpoint, result.ref.repo, entry.path, result.commit)
    record_origin(store, key, Origin(*place, "pulled", result.revision, entry.sha256, entry.oid or None, entry.size))


def _card(client: Client, result: Pulled) -> Card | None:
    """What the card of the repository says at this commit; None where there is none, or it cannot be had."""
    from hubtool.hub import cards

    text = _card_text(client, result)
    if text is None:
        return None
    try:
        front: Mapping[str, Any] = cards.parse(text).front
    except HubtoolError as error:
        result.warnings.append(f"the card is broken: {error.message}")
        front = {}
    return card_facts(result.endpoint, result.ref.repo, result.commit, front, text)


def _card_text(client: Client, result: Pulled) -> str | None:
    from hubtool.hub import local_cache
    from hubtool.hub.pulling import is_file_of

    pinned, entry = result.ref.at(result.commit), result.card_entry
    if entry is None:
        return None
    pulled = [item.target for item in result.items if item.entry == entry and item.error is None]
    try:
        for path in (*pulled, *local_cache.copies(pinned, entry)):
            if is_file_of(path, entry):
                return path.read_text("utf-8", "replace")
        return None if result.local else client.read(pinned, entry, MAX_CARD).decode("utf-8", "replace")
    except (HubtoolError, OSError) as error:
        result.warnings.append(f"the card was not read: {error}")
        return None


def card_facts(endpoint: str, repo: str, commit: str, front: Mapping[str, Any], raw: str | None) -> Card:
    """The facts of a card's front matter that the library keeps; values of the wrong type are left out."""
    from hubtool.registry.hub_facts import Card

    text = {name: value for name, value in front.items() if isinstance(value, str)}
    return Card(
        endpoint,
        repo,
        commit,
        license=text.get("license"),
        license_name=text.get("license_name"),
        license_link=text.get("license_link"),
        base_models=tuple(_strings(front.get("base_model"))),
        relation=text.get("base_model_relation"),
        trigger_words=tuple(word for part in _strings(front.get("instance_prompt")) for word in _split(part)),
        raw=raw,
    )


def _strings(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, str) and item]


def _split(prompt: str) -> list[str]:
    """The trigger words of an ``instance_prompt``, which joins several with commas."""
    return [word.strip() for word in prompt.split(",") if word.strip()]
