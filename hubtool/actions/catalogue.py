"""Reading the library: ``ls``, ``show``, ``stats``, ``fields``. Everything returned is ready for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hubtool.actions.dates import rfc3339
from hubtool.actions.hub_known import hub_known
from hubtool.registry import browse, fields
from hubtool.registry.query import Query, both, exactly, parse, words
from hubtool.registry.records import Place, Reader, Row

# What inspect prints for every file; a broken one has none of it.
_BLANK: Mapping[str, Any] = {
    "family_candidates": [], "components": {}, "tensors": 0, "parameters": 0, "ranks": [], "alphas": [], "metadata": {}, "embeddings": [],
}  # fmt: skip
COLUMNS = ("id", "kind", "algorithm", "family", "rank", "size", "state", "path")


def ls(
    reader: Reader, query: str | Iterable[str] = "", *, options: Mapping[str, str | None] | None = None, text: str | None = None,
    sort: str | None = None, limit: int | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """The artifacts that match a query, as rows for any listing format.

    ``options`` (kind, family, algorithm, path ...) and ``text`` narrow the query, ``sort`` and ``limit`` overrule it. Raises UsageProblem.
    """
    narrowed = [exactly(name, value) for name, value in (options or {}).items() if value]
    found = both(parse(query), *narrowed, *([words(text)] if text else []))
    order = parse(f"sort:{sort}").sort if sort else found.sort
    shown = Query(found.root, order, found.limit if limit is None else limit, found.every_state)
    return [row_json(row) for row in browse.select(reader, shown)]


def row_json(row: Row) -> dict[str, Any]:
    """One artifact in a listing. ``path`` is that of the best place; ``paths`` are all."""
    best = row.places[0] if row.places else None
    return {
        "id": row.id,
        "path": best.path if best else "",
        "name": best.path.rpartition("/")[2] if best else "",
        "title": row.title,
        "kind": row.kind,
        "algorithm": row.algorithm,
        "family": row.family,
        "base_model": row.base_model,
        "layout": row.layout,
        "format": row.format,
        "size": row.size,
        "dtypes": list(row.dtypes),
        "rank": row.rank,
        "alpha": row.alpha,
        "state": row.state,
        "health": row.health,
        "sha256": row.sha256,
        "trigger_words": list(row.trigger_words),
        "tags": list(row.tags),
        "added": rfc3339(row.added),
        "paths": [place.path for place in row.places],
    }


def show(reader: Reader, ref: str) -> dict[str, Any]:
    """Everything known about the artifact that ``ref`` names: the document of ``inspect --json``, and what the library adds.

    Raises NotFound or AmbiguousRef.
    """
    row = browse.find(reader, ref)
    listed = row_json(row)
    known = browse.hashes(reader, row.key)
    return {
        **_BLANK,
        **listed,
        "kind": row.kind or "unknown",
        **browse.identity(reader, row.key),
        **{name: listed[name] for name in ("id", "path", "size", "base_model", "trigger_words", "state", "health")},
        "hashes": {**dict.fromkeys(("sha256", "payload_sha256", "content_id")), **known.get("computed", {})},
        "hashes_by_origin": known,
        "findings": browse.findings(reader, row.key),
        "locations": [place_json(place) for place in row.places],
        "lineage": _dated(browse.lineage(reader, row.key)),
        "user": browse.notes(reader, row.key),
        "hub": hub_known(reader, row),
    }


def place_json(place: Place) -> dict[str, Any]:
    """One location."""
    return {
        "path": place.path,
        "state": place.state,
        "size": place.size,
        "modified": rfc3339(place.mtime_ns / 1e9) if 0 <= place.mtime_ns < 253_402_300_800 * 10**9 else None,
        "link": place.link,
        "verified": rfc3339(place.verified_at),
    }


def _dated(lineage: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    return {side: [{**edge, "at": rfc3339(edge["at"])} for edge in edges] for side, edges in lineage.items()}


def stats(reader: Reader) -> dict[str, Any]:
    """Numbers: artifacts and bytes by kind, family, algorithm, format and health; locations by state; roots."""
    kinds = browse.counts(reader, "kind")
    facets = {name: _facet(browse.counts(reader, name)) for name in ("family", "algorithm", "format", "health")}
    return {
        "artifacts": sum(count for _, count, _ in kinds),
        "bytes": sum(size for _, _, size in kinds),
        "kind": _facet(kinds),
        **facets,
        "locations": browse.location_counts(reader),
        "unhashed": browse.unhashed(reader),
        "roots": [{**root, "last_scan": rfc3339(root["last_scan"])} for root in browse.roots(reader)],
    }


def _facet(counts: Sequence[tuple[str | None, int, int]]) -> list[dict[str, Any]]:
    return [{"value": value, "artifacts": count, "bytes": size} for value, count, size in counts]


def list_fields() -> list[dict[str, str]]:
    """The fields of the query language: name, type, how a value is written, other names."""
    other: dict[str, list[str]] = {}
    for alias, name in fields.ALIASES.items():
        other.setdefault(name, []).append(alias)
    rows = [
        {"field": field.name, "type": field.type, "help": field.help, "aliases": ", ".join(other.get(field.name, ()))}
        for field in fields.FIELDS.values()
    ]
    flags = {"is": ", ".join(sorted(fields.FLAGS)), "has": ", ".join(sorted(fields.HAS)), "no": "the opposite of has"}
    rows += [{"field": name, "type": "flag", "help": text, "aliases": ""} for name, text in flags.items()]
    directives = {"sort": "any field, -field for descending: sort:-size,name", "limit": "a number of rows"}
    return rows + [
        {"field": name, "type": "directive", "help": text, "aliases": ""} for name, text in directives.items()
    ]
