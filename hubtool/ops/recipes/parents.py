"""What the inputs of an operation said about themselves, in one output.

Licences become the list of all that were stated; trigger words the union; titles ``modelspec.merged_from``. Everything else that an input's
metadata said (``ss_*``, ``modelspec.*``) is kept apart for each of them in ``hubtool.parents``, as JSON: nothing of it is true of the output.
Keys: Stability AI's ModelSpec, sd-scripts' ``ss_*``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hubtool.errors import FileError
from hubtool.formats.base import TensorFile
from hubtool.formats.documents import read_json
from hubtool.layouts.claims import read_claims
from hubtool.layouts.receipt import KEY as RECEIPT
from hubtool.layouts.receipt import STALE, carried_metadata
from hubtool.tensors.strict_json import JsonError, loads

PARENTS = "hubtool.parents"
DOCUMENTS = {
    "hubtool.recipe": "hubtool.recipe.json",
    PARENTS: f"{PARENTS}.json",
}  # metadata of a file -> document of a folder
_RECIPE = "hubtool.recipe"
_LICENCE, _TRIGGERS, _TITLE, _FROM = (
    "modelspec.license", "modelspec.trigger_phrase", "modelspec.title", "modelspec.merged_from",
)  # fmt: skip
_UNSTATED = frozenset({"", "none", "unknown", "null"})
_PICTURE, _HEADER = "modelspec.thumbnail", "hubtool.base"  # a picture shows another file, and a header takes room
_MAX_DEPTH = 48
_JOIN = ", "


@dataclass(frozen=True, slots=True)
class Parent:
    """An input as the output remembers it. ``name``: its file name; ``trigger_words``: what its metadata says activates it."""

    name: str
    sha256: str | None = None
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    trigger_words: tuple[str, ...] = ()

    @classmethod
    def of(cls, file: TensorFile, sha256: str | None = None) -> Parent:
        """The parent that an opened input is."""
        papers = {key: text for key, name in DOCUMENTS.items() if (text := _paper(file.path / name)) is not None}
        return cls(file.path.name, sha256, {**file.metadata, **papers}, read_claims(file).trigger_words)

    def to_json(self) -> dict[str, Any]:
        said = carried_metadata(self.metadata, "format", _PICTURE, _HEADER)
        nested = {name: _document(said.pop(key, None)) for name, key in (("recipe", _RECIPE), ("parents", PARENTS))}
        document: dict[str, Any] = {"name": self.name, "sha256": self.sha256, "metadata": said, **nested}
        return {name: value for name, value in document.items() if value not in (None, {})}


def _paper(path: Path) -> str | None:
    """A document of a folder as text; None where there is none that can be read."""
    try:
        return json.dumps(read_json(path)) if path.parent.is_dir() and path.is_file() else None
    except FileError:
        return None


def merged(own: Mapping[str, str], parents: Sequence[Parent]) -> dict[str, str]:
    """``own`` metadata of an output with what its parents said. Stale hashes and pictures are dropped; what the layout itself needs stays."""
    dropped = STALE | {RECEIPT, PARENTS, _RECIPE, _PICTURE}
    said = {key: text for key, text in own.items() if key not in dropped}
    licences = _union(_split(parent.metadata.get(_LICENCE, "")) for parent in parents)
    words = _union(parent.trigger_words for parent in parents)
    titles = _union([parent.metadata.get(_TITLE) or parent.name] for parent in parents)
    lists = {_LICENCE: licences, _TRIGGERS: words, _FROM: titles}
    said |= {key: _JOIN.join(values) for key, values in lists.items() if values}
    kept = [parent.to_json() for parent in parents]
    return {**said, PARENTS: json.dumps(kept, sort_keys=True, ensure_ascii=False, separators=(",", ":"))}


def _split(text: str) -> list[str]:
    return [part for part in map(str.strip, text.split(",")) if part.lower() not in _UNSTATED]


def _union(lists: Iterable[Iterable[str]]) -> list[str]:
    """Every value once, in order of appearance."""
    return list(dict.fromkeys(value for values in lists for value in values))


def _document(text: str | None) -> Any:
    """A parent's own record, as an object; left out where it is no JSON."""
    try:
        return None if text is None else loads(text.encode(), max_depth=_MAX_DEPTH)
    except (JsonError, UnicodeEncodeError):
        return None
