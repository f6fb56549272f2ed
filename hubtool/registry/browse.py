"""Reading the library: rows for ``ls``, one artifact for ``show``, numbers for ``stats``. Plain SQL that any ``Reader`` runs."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from hubtool.errors import AmbiguousRef, NotFound, UsageProblem
from hubtool.registry.conditions import Value
from hubtool.registry.fields import FIELDS
from hubtool.registry.query import Query
from hubtool.registry.records import Place, Reader, Row
from hubtool.registry.text import raw_path

_FACTS = (  # Row attribute, column
    ("key", "id"), ("id", "uid"), ("title", "title"), ("kind", "kind"), ("algorithm", "algorithm"), ("family", "family"),
    ("base_model", "base_model"), ("layout", "layout"), ("format", "format"), ("size", "size"), ("dtypes", "dtypes"),
    ("rank", "rank"), ("alpha", "alpha"), ("health", "health"), ("sha256", "sha256"), ("added", "added_at"),
)  # fmt: skip
_NAMES = tuple(name for name, _ in _FACTS)
_COLUMNS = ", ".join(f"a.{column}" for _, column in _FACTS)
_VISIBLE = "EXISTS (SELECT 1 FROM location v WHERE v.artifact_id = a.id AND v.state IN ('present', 'offline'))"
_PLACES = (
    "SELECT l.id, l.artifact_id, r.path, l.relpath, l.state, l.size, l.mtime_ns, l.link, l.verified_at "
    "FROM location l JOIN root r ON r.id = l.root_id WHERE l.state <> 'superseded'"
)
_TAGS = (
    "SELECT ea.artifact_id, t.name FROM entry_artifact ea JOIN entry_tag et ON et.entry_id = ea.entry_id "
    "JOIN tag t ON t.id = et.tag_id WHERE ea.role <> 'previous'"
)
_MANY = 400  # above this many artifacts, reading a whole table is faster than naming them
_MAX_IDENTITY = 256 << 20  # bytes of an inflated identity document


def select(reader: Reader, query: Query) -> list[Row]:
    """The artifacts a query asks for, in its order. Without a word on states: those present or on an offline root."""
    clause, parameters = query.clause()
    visible = "1 = 1" if query.every_state else _VISIBLE
    sql = f"SELECT {_COLUMNS} FROM artifact a WHERE {visible} AND {clause} ORDER BY {query.order()}"
    if query.limit is not None:
        sql, parameters = f"{sql} LIMIT :limit", {**parameters, "limit": query.limit}
    return _rows(reader, reader.rows(sql, dict(parameters)))


def _rows(reader: Reader, found: Sequence[tuple[Any, ...]]) -> list[Row]:
    keys = [row[0] for row in found]
    places = _grouped((row[1], _place(row)) for row in _about(reader, _PLACES, "l.artifact_id", keys, "l.id"))
    words = _grouped(
        _about(
            reader, "SELECT w.artifact_id, w.text FROM trigger_word w WHERE 1 = 1", "w.artifact_id", keys, "w.position"
        )
    )
    tags = _grouped(_about(reader, _TAGS, "ea.artifact_id", keys, "t.name_key"))
    return [_row(row, _ordered(places.get(row[0], ())), _unique(words, row[0]), _unique(tags, row[0])) for row in found]


def _row(row: tuple[Any, ...], places: tuple[Place, ...], words: tuple[str, ...], tags: tuple[str, ...]) -> Row:
    facts: dict[str, Any] = dict(zip(_NAMES, row, strict=True))
    facts["dtypes"] = tuple(facts["dtypes"].upper().split(",")) if facts["dtypes"] else ()
    return Row(**facts, places=places, trigger_words=words, tags=tags)


def _about(reader: Reader, sql: str, column: str, keys: Sequence[int], order: str) -> list[tuple[Any, ...]]:
    if len(keys) > _MANY:
        return reader.rows(f"{sql} ORDER BY {order}")
    names = {f"k{at}": key for at, key in enumerate(keys)}
    listed = ", ".join(f":{name}" for name in names) or "NULL"
    return reader.rows(f"{sql} AND {column} IN ({listed}) ORDER BY {order}", names)


def _grouped(pairs: Iterable[Sequence[Any]]) -> dict[int, list[Any]]:
    groups: dict[int, list[Any]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def _unique(groups: dict[int, list[Any]], key: int) -> tuple[str, ...]:
    return tuple(dict.fromkeys(groups.get(key, ())))


def _place(row: tuple[Any, ...]) -> Place:
    raw = bytes(row[2]).rstrip(b"/") + b"/" + bytes(row[3])
    return Place(row[0], row[1], raw, *row[4:])


def _ordered(places: Sequence[Place]) -> tuple[Place, ...]:
    rank = {"present": 0, "offline": 1, "missing": 2, "trashed": 3}
    return tuple(sorted(places, key=lambda place: rank[place.state]))


def find(reader: Reader, ref: str) -> Row:
    """The artifact that a REF names: a path, an id or its unique prefix, or a hash prefix of at least 6 digits.

    Raises NotFound or AmbiguousRef.
    """
    if not ref:
        raise UsageProblem("an empty reference names nothing", hint="a path, an id, or 6 digits of a hash")
    keys = _by_path(reader, ref) or _by_id(reader, ref.lower()) or _by_hash(reader, ref.lower())
    rows = _by_keys(reader, keys)
    if not rows:
        hint = f"hubtool scan {ref}" if os.path.lexists(ref) else "a path, an id, or 6 digits of a hash; hubtool ls"
        raise NotFound(f"nothing in the library is called {ref!r}", hint=hint)
    if len(rows) > 1:
        named = ", ".join(f"{row.id} ({row.places[0].path})" if row.places else row.id for row in rows[:5])
        raise AmbiguousRef(f"{ref!r} could be {len(rows)} artifacts: {named}", hint="give more digits, or the path")
    return rows[0]


def by_key(reader: Reader, key: int) -> Row:
    """The artifact with a primary key."""
    return _by_keys(reader, [key])[0]


def _by_keys(reader: Reader, keys: Iterable[int]) -> list[Row]:
    wanted = sorted(set(keys))[:_MANY]
    names = {f"k{at}": key for at, key in enumerate(wanted)}
    listed = ", ".join(f":{name}" for name in names) or "NULL"
    return _rows(
        reader, reader.rows(f"SELECT {_COLUMNS} FROM artifact a WHERE a.id IN ({listed}) ORDER BY a.id", names)
    )


def _by_path(reader: Reader, ref: str) -> list[int]:
    if "\0" in ref:
        return []
    for raw in dict.fromkeys((raw_path(os.path.abspath(ref)), raw_path(os.path.realpath(ref)))):
        if found := at_path(reader, raw):
            return [found.artifact_id]
    return []


def at_path(reader: Reader, raw: bytes) -> Place | None:
    """The location at an absolute path; a present one before one that is missing."""
    found = []
    for root_id, root in reader.rows("SELECT id, path FROM root"):
        prefix = bytes(root).rstrip(b"/") + b"/"
        if raw.startswith(prefix):
            parameters = {"root": root_id, "relpath": raw[len(prefix) :]}
            found += [
                _place(row)
                for row in reader.rows(f"{_PLACES} AND l.root_id = :root AND l.relpath = :relpath", parameters)
            ]
    return next(iter(_ordered(found)), None)


def _by_id(reader: Reader, ref: str) -> list[int]:
    return _prefixed(reader, "SELECT a.id FROM artifact a WHERE", "a.uid", ref)


def _by_hash(reader: Reader, ref: str) -> list[int]:
    digest = ref.removeprefix("sha256:").removeprefix("0x")
    if len(digest) < 6 or not set(digest) <= set("0123456789abcdef"):
        return []
    any_origin = "SELECT h.artifact_id FROM hash h WHERE"
    # What was computed is a fact; a claim inside a file is followed only where no fact answers.
    return _prefixed(reader, f"{any_origin} h.origin = 'computed' AND", "h.value", digest) or _prefixed(
        reader, any_origin, "h.value", digest
    )


def _prefixed(reader: Reader, sql: str, column: str, prefix: str) -> list[int]:
    parameters = {"low": prefix, "high": prefix + "z" * 64}
    return [row[0] for row in reader.rows(f"{sql} {column} >= :low AND {column} <= :high", parameters)]


def places(reader: Reader, state: str = "present") -> list[Place]:
    """Every location in a state, in order of root and path."""
    return [
        _place(row)
        for row in reader.rows(f"{_PLACES} AND l.state = :state ORDER BY r.path, l.relpath", {"state": state})
    ]


def roots(reader: Reader) -> list[dict[str, Any]]:
    """The scanned folders: path, state, number of present files."""
    rows = reader.rows(
        "SELECT r.path, r.online, r.last_scan_at, (SELECT COUNT(*) FROM location l WHERE l.root_id = r.id AND l.state = 'present') "
        "FROM root r ORDER BY r.path"
    )
    return [
        {
            "path": os.fsdecode(bytes(row[0])),
            "state": "online" if row[1] else "offline",
            "last_scan": row[2],
            "files": row[3],
        }
        for row in rows
    ]


def identity(reader: Reader, key: int) -> dict[str, Any]:
    """The document that ``inspect --json`` printed when the artifact was scanned; empty where there is none."""
    rows = reader.rows("SELECT identity FROM artifact_doc WHERE artifact_id = :key", {"key": key})
    if not rows or not rows[0][0]:
        return {}
    document = json.loads(zlib.decompressobj().decompress(bytes(rows[0][0]), _MAX_IDENTITY))
    return dict(document)


def hashes(reader: Reader, key: int) -> dict[str, dict[str, str]]:
    """Hashes by origin (``computed``, ``embedded``, ...) and name."""
    found: dict[str, dict[str, str]] = {}
    rows = reader.rows(
        "SELECT origin, algo, value FROM hash WHERE artifact_id = :key ORDER BY origin, algo, value", {"key": key}
    )
    for origin, algo, value in rows:
        found.setdefault(origin, {})[algo] = value
    return found


def findings(reader: Reader, key: int) -> list[dict[str, Any]]:
    """What is worth telling about an artifact, as ``inspect`` prints it, with who found it."""
    rows = reader.rows(
        "SELECT code, severity, message, source FROM finding WHERE artifact_id = :key ORDER BY id", {"key": key}
    )
    return [{"code": row[0], "severity": row[1], "message": row[2], "source": row[3]} for row in rows]


def lineage(reader: Reader, key: int) -> dict[str, list[dict[str, Any]]]:
    """``parents`` it was made from and ``children`` made from it."""
    columns = "g.op, g.params, g.strength, g.tool, g.at, a.uid"
    parents = reader.rows(
        f"SELECT {columns}, g.parent_ref FROM lineage g LEFT JOIN artifact a ON a.id = g.parent_id WHERE g.child_id = :key "
        "ORDER BY g.at, g.position",
        {"key": key},
    )
    children = reader.rows(
        f"SELECT {columns}, a.sha256 FROM lineage g JOIN artifact a ON a.id = g.child_id WHERE g.parent_id = :key ORDER BY g.at, g.id",
        {"key": key},
    )
    return {"parents": [_edge(row) for row in parents], "children": [_edge(row) for row in children]}


def _edge(row: tuple[Any, ...]) -> dict[str, Any]:
    op, params, strength, tool, at, uid, ref = row
    return {
        "op": op,
        "id": uid,
        "ref": ref,
        "strength": strength,
        "params": json.loads(params or "{}"),
        "tool": tool,
        "at": at,
    }


def notes(reader: Reader, key: int) -> dict[str, Any]:
    """What the user said: title, notes, rating, favorite; empty when nothing."""
    rows = reader.rows(
        "SELECT e.title, e.notes, e.rating, e.favorite FROM entry_artifact ea JOIN entry e ON e.id = ea.entry_id "
        "WHERE ea.artifact_id = :key AND ea.role <> 'previous' ORDER BY e.id",
        {"key": key},
    )
    return dict(zip(("title", "notes", "rating", "favorite"), rows[0], strict=True)) if rows else {}


def counts(reader: Reader, field: str) -> list[tuple[str | None, int, int]]:
    """(value, artifacts, bytes) for each value of a word field, most frequent first; present and offline artifacts."""
    column = FIELDS[field].sql
    sql = (
        f"SELECT {column}, COUNT(*), SUM(a.size) FROM artifact a WHERE {_VISIBLE} GROUP BY {column} ORDER BY 2 DESC, 1"
    )
    return [(row[0], int(row[1]), int(row[2])) for row in reader.rows(sql)]


def location_counts(reader: Reader) -> dict[str, int]:
    """Number of locations by state."""
    rows = reader.rows("SELECT state, COUNT(*) FROM location WHERE state <> 'superseded' GROUP BY state ORDER BY state")
    return {row[0]: int(row[1]) for row in rows}


def unhashed(reader: Reader) -> int:
    """Present files whose bytes were never hashed."""
    sql = "SELECT COUNT(*) FROM location WHERE state = 'present' AND verified_at IS NULL"
    return int(reader.rows(sql)[0][0])


def subjects(reader: Reader) -> dict[int, dict[str, list[Value]]]:
    """Every artifact as the values of every field: what ``Query.match`` judges. Reads the whole library."""
    found: dict[int, dict[str, list[Value]]] = {row[0]: {} for row in reader.rows("SELECT id FROM artifact")}
    for name, field in FIELDS.items():
        source = f"artifact a, {field.source}" if field.source else "artifact a"
        for key, value in reader.rows(f"SELECT a.id, {field.sql} FROM {source}"):
            if value is not None:
                found[key].setdefault(name, []).append(value)
    return found
