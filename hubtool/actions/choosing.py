"""Which artifacts a command is about: REFs, or a query."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from hubtool.errors import NotFound, UsageProblem
from hubtool.registry import browse
from hubtool.registry.query import parse
from hubtool.registry.records import Place, Reader, Row
from hubtool.registry.text import raw_path

_ID = re.compile(r"[0-9a-z]{6,64}")  # shorter prefixes would swallow words of a query


def choose(reader: Reader, words: Sequence[str]) -> list[Row]:
    """The artifacts that ``words`` name: all of them paths, ids or hashes; else one query. Raises UsageProblem, NotFound."""
    if not words:
        raise UsageProblem("say which artifacts", hint="a path, an id, or a query such as kind:lora family:sdxl")
    rows = [_ref(reader, word) for word in words]
    if all(rows):
        return list({row.key: row for row in rows if row is not None}.values())
    found = browse.select(reader, parse(words))
    if not found:
        raise NotFound(
            f"nothing in the library matches {' '.join(words)!r}", hint="hubtool ls QUERY shows what a query finds"
        )
    return found


def choose_places(reader: Reader, words: Sequence[str]) -> list[tuple[Row, Place]]:
    """The locations of the chosen artifacts; of one that a path names, only what lies at that path."""
    named = {place.id for word in words if (place := _at(reader, word)) is not None}
    rows = choose(reader, words)
    return [(row, place) for row in rows for place in [own for own in row.places if own.id in named] or row.places]


def _at(reader: Reader, word: str) -> Place | None:
    return None if "\0" in word else browse.at_path(reader, raw_path(os.path.abspath(word)))


def _ref(reader: Reader, word: str) -> Row | None:
    if (place := _at(reader, word)) is not None:
        return browse.by_key(reader, place.artifact_id)
    if not _ID.fullmatch(word.lower().removeprefix("sha256:")):
        return None
    try:
        return browse.find(reader, word)
    except NotFound:
        return None
