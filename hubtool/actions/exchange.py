"""``export`` and ``import``: what a person said about artifacts, keyed by hashes, so that it survives another disk, path or program.

A line of an export is one artifact: its hashes, what was said, and facts for people and other programs, which an import ignores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hubtool.actions.catalogue import row_json
from hubtool.errors import CorruptFile
from hubtool.registry import browse, curation, hub_facts
from hubtool.registry.curation import Change, Edit, Said
from hubtool.registry.query import parse
from hubtool.registry.records import Reader, Row
from hubtool.registry.store import Store
from hubtool.registry.text import fold
from hubtool.tensors.strict_json import JsonError, loads_config

VERSION = 1
COLUMNS = ("id", "title", "notes", "rating", "favorite", "tags", "kind", "family", "name", "path", "sha256")
KEYS = ("sha256", "payload_sha256", "content_id")  # the surest first
_HINT = "hubtool export --format ndjson makes such files"


def export(store: Store, words: Sequence[str] = (), *, said_only: bool = False) -> Iterator[dict[str, Any]]:
    """One document an artifact, for those that a query finds. ``said_only``: leave out artifacts that nothing was said about."""
    rows = browse.select(store, parse(words))
    said = curation.read(store, [row.key for row in rows])
    hashes = {key: values for key, *values in store.rows("SELECT id, sha256, payload_sha256, content_id FROM artifact")}
    origins: dict[int, list[str]] = {}
    for origin in hub_facts.origins(store):
        origins.setdefault(origin.artifact, []).append(f"{origin.ref}#{origin.commit}")
    for row in rows:
        if said_only and said[row.key] == Said():
            continue
        own = {**row_json(row), **dict(zip(KEYS, hashes[row.key], strict=True)), **said[row.key].to_json()}
        yield {"hubtool": VERSION, **own, "origins": origins.get(row.key, [])}


@dataclass(slots=True)
class Imported:
    """``changes``: what was, or would be, said anew. ``unmatched``: names of lines whose file the library does not have."""

    lines: int = 0
    changes: list[Change] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        changed = [
            {"id": one.uid, "before": one.before.to_json(), "after": one.after.to_json()} for one in self.changes
        ]
        return {"lines": self.lines, "changed": len(changed), "changes": changed, "unmatched": self.unmatched}


def bring(store: Store, content: bytes, *, overwrite: bool = False, dry_run: bool = False) -> Imported:
    """Read an export (NDJSON or JSON) and say the same about the files with the same hashes.

    Tags are united, other values fill what is empty; with ``overwrite`` those of the export win. Journalled as one command.
    Raises CorruptFile for what is no export; then nothing is changed.
    """
    documents = list(_documents(content))
    result = Imported(lines=len(documents))
    edits: dict[int, Edit] = {}
    rows: dict[int, Row] = {}
    for document in documents:
        row = _match(store, document)
        if row is None:
            result.unmatched.append(str(document.get("path") or document.get("name") or document.get("sha256")))
            continue
        rows[row.key] = row
        edits[row.key] = _edit(_said(document), overwrite, edits.get(row.key))
    artifacts = [(row.key, row.id) for row in rows.values()]
    if dry_run:
        result.changes = curation.preview(store, artifacts, edits.__getitem__)
    else:
        result.changes = curation.change(store, artifacts, edits.__getitem__, "import")
    return result


def _documents(content: bytes) -> Iterator[Mapping[str, Any]]:
    """The documents of an export: NDJSON, or one JSON list."""
    for number, document in _items(content):
        if not isinstance(document, dict) or not any(document.get(key) for key in KEYS):
            raise CorruptFile(f"item {number} is not one of an export: it has no hash", hint=_HINT)
        yield document


def _items(content: bytes) -> Iterator[tuple[int, Any]]:
    if content.lstrip()[:1] == b"[":
        yield from enumerate(_parsed(content, 1), 1)
        return
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            yield number, _parsed(line, number)


def _parsed(text: bytes, number: int) -> Any:
    try:
        return loads_config(text, max_depth=16)
    except JsonError as error:
        raise CorruptFile(f"line {number} of the export cannot be read: {error}", hint=_HINT) from error


def _match(reader: Reader, document: Mapping[str, Any]) -> Row | None:
    """The artifact with the same bytes, else the only one with the same tensors, else with the same weights."""
    for key in KEYS:
        value = document.get(key)
        if isinstance(value, str) and value:
            found = reader.rows(f"SELECT id FROM artifact WHERE {key} = :value LIMIT 2", {"value": value.lower()})
            if len(found) == 1:
                return browse.by_key(reader, int(found[0][0]))
    return None


def _said(document: Mapping[str, Any]) -> Said:
    """What a line says; values of a wrong type say nothing."""
    title, notes = (
        value if isinstance(value := document.get(name), str) and value else None for name in ("title", "notes")
    )
    rating, tags = document.get("rating"), document.get("tags")
    valid = isinstance(rating, int) and not isinstance(rating, bool) and 0 <= rating <= 5
    names = tuple(tag for tag in tags if isinstance(tag, str) and tag.strip()) if isinstance(tags, list) else ()
    return Said(title, notes, rating if valid else None, document.get("favorite") is True, names)


def _edit(theirs: Said, overwrite: bool, earlier: Edit | None) -> Edit:
    def apply(mine: Said) -> Said:
        mine = earlier(mine) if earlier else mine
        first, second = (theirs, mine) if overwrite else (mine, theirs)
        tags = {fold(tag): tag for tag in (*second.tags, *first.tags)}
        return replace(
            first,
            title=first.title or second.title,
            notes=first.notes or second.notes,
            rating=second.rating if first.rating is None else first.rating,
            favorite=first.favorite or second.favorite,
            tags=tuple(tags[key] for key in sorted(tags)),
        )

    return apply
