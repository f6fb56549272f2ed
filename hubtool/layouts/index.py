"""The index of module names over all families: which families could know a set of spelled modules, without loading any of them.

``schemas/index.json.gz`` maps every spelling with its indices as ``#`` and its dots as ``_`` to the families that have it. It is made from the
tables (``python -m tests.tables index``); a test compares it with what ``build`` makes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from hubtool import resources
from hubtool.layouts import tables, vocabulary

_NUMBER = re.compile(r"\d+")


def pattern(stem: str) -> str:
    """``blocks.3.attn.qkv`` and ``blocks_3_attn_qkv`` -> ``blocks_#_attn_qkv``."""
    return _NUMBER.sub("#", stem).replace(".", "_")


def shortlist(stems: Iterable[str]) -> list[tuple[str, int]]:
    """(family, number of ``stems`` it could know), the most first. A family that is not listed knows none."""
    document = _load()
    masks = Counter(document["patterns"].get(text, 0) for text in map(pattern, stems))
    count: Counter[str] = Counter()
    for mask, times in masks.items():
        for bit, name in enumerate(document["families"]):
            if mask >> bit & 1:
                count[name] += times
    return sorted(count.items(), key=lambda row: (-row[1], row[0]))


@cache
def _load() -> Mapping[str, Any]:
    path = resources.schemas() / "index.json.gz"
    return MappingProxyType(json.loads(resources.unpacked(path)))


def build() -> dict[str, Any]:
    """The index of the tables as they are now: {families: [...], patterns: {pattern: bit mask over families}}."""
    families = tables.family_ids()
    masks: dict[str, int] = {}
    for bit, name in enumerate(families):
        for text in _patterns(name):
            masks[text] = masks.get(text, 0) | 1 << bit
    return {"families": list(families), "patterns": dict(sorted(masks.items()))}


def _patterns(name: str) -> set[str]:
    return {
        pattern(spelled)
        for component in tables.family(name).components
        for size in vocabulary.models(name, component)
        for spelled in vocabulary.spellings(name, component, ".", size)
    }
