"""Full hashes arriving behind a scan: the queue, and what a hash does to the artifact that stood in for the bytes until then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, and_, delete, insert, or_, select, update

from hubtool.registry import models
from hubtool.registry.columns import now
from hubtool.registry.merging import adopt, merge
from hubtool.registry.records import FileStat, HashResult, Place
from hubtool.registry.store import Store
from hubtool.registry.text import new_uid
from hubtool.registry.writing import inherit

_L = models.location.c
_A = models.artifact.c
_COLUMNS = ("sha256", "payload_sha256", "content_id")
QUEUED = (
    "l.state = 'present' AND l.verified_at IS NULL AND l.artifact_id IN "
    "(SELECT id FROM artifact WHERE health = 'ok' OR (form = 'file' AND health <> 'unreadable'))"
)


def queue(store: Store, after: tuple[int, int] = (-1, 0), limit: int = 500) -> list[Place]:
    """Locations whose bytes were never hashed, small ones first. ``after``: (size, id) of the last one seen, to page on."""
    rows = store.rows(
        "SELECT l.id, l.artifact_id, r.path, l.relpath, l.state, l.size, l.mtime_ns, l.link FROM location l "
        f"JOIN root r ON r.id = l.root_id WHERE {QUEUED} AND (l.size > :size OR (l.size = :size AND l.id > :id)) "
        "ORDER BY l.size, l.id LIMIT :limit",
        {"size": after[0], "id": after[1], "limit": limit},
    )
    return [place(row) for row in rows]


def queued_bytes(store: Store) -> tuple[int, int]:
    """(locations, bytes) that wait to be hashed."""
    count, size = store.rows(f"SELECT COUNT(*), COALESCE(SUM(l.size), 0) FROM location l WHERE {QUEUED}")[0]
    return int(count), int(size)


def place(row: tuple[Any, ...]) -> Place:
    """A ``Place`` from (id, artifact id, root path, relpath, state, size, mtime_ns, link[, verified_at])."""
    raw = bytes(row[2]).rstrip(b"/") + b"/" + bytes(row[3])
    return Place(row[0], row[1], raw, *row[4:])


def record(store: Store, results: Sequence[HashResult]) -> list[bool]:
    """Store computed hashes in one transaction; for each whether it was: a location that has changed meanwhile is left alone.

    A stand-in whose bytes turn out to be known is merged into the known artifact. A location whose bytes are not those of its
    artifact (same quick identity, different bytes) moves to another artifact.
    """
    with store.transaction() as connection:
        return [_record_one(connection, result) for result in results]


def _record_one(connection: Connection, result: HashResult) -> bool:
    row = connection.execute(select(models.location).where(_L.id == result.location_id)).first()
    if row is None or not result.stat.same(FileStat(row.size, row.mtime_ns, row.inode, row.device)):
        return False
    key = _owner(connection, row, result.hashes.get("sha256"))
    _set_hashes(connection, key, result)
    same = and_(_L.inode == row.inode, _L.device == row.device, _L.size == row.size, _L.mtime_ns == row.mtime_ns)
    files = or_(_L.id == row.id, and_(same, _L.link != "folder", _L.state == "present"))
    connection.execute(update(models.location).where(files).values(artifact_id=key, verified_at=now()))
    return True


def _owner(connection: Connection, row: Any, sha256: str | None) -> int:
    """The artifact that the hashed bytes of location ``row`` are."""
    mine = connection.execute(select(models.artifact).where(_A.id == row.artifact_id)).one()
    if sha256 is None or mine.sha256 == sha256:
        return int(mine.id)
    found = connection.execute(select(_A.id).where(_A.sha256 == sha256)).scalar()
    if found is not None:
        if mine.sha256 is None:
            merge(connection, mine.id, found)
        return int(found)
    return int(mine.id) if mine.sha256 is None else _split(connection, mine)


def _split(connection: Connection, mine: Any) -> int:
    """A new artifact described like ``mine``: the header was the same, the bytes are not."""
    values = {name: value for name, value in mine._mapping.items() if name not in {"id", "uid", "added_at", *_COLUMNS}}
    made = insert(models.artifact).returning(_A.id)
    key = connection.execute(made, {**values, "uid": new_uid(), "added_at": now()}).scalar_one()
    doc = connection.execute(select(models.artifact_doc).where(models.artifact_doc.c.artifact_id == mine.id)).first()
    if doc is not None:
        connection.execute(insert(models.artifact_doc), {**doc._mapping, "artifact_id": key})
    adopt(connection, models.trigger_word, mine.id, key, ("text", "source"))
    inherit(connection, mine.id, key)
    return int(key)


def _set_hashes(connection: Connection, key: int, result: HashResult) -> None:
    hashes = {name: value.lower() for name, value in result.hashes.items()}
    if result.content_id:
        hashes["content_id"] = result.content_id
    columns = {name: hashes[name] for name in _COLUMNS if name in hashes}
    if columns:
        connection.execute(update(models.artifact).where(_A.id == key).values(**columns))
    table = models.hash_
    connection.execute(delete(table).where(table.c.artifact_id == key, table.c.origin == "computed"))
    rows = [
        {"algo": algo, "value": value, "artifact_id": key, "origin": "computed", "at": now()}
        for algo, value in hashes.items()
    ]
    if rows:
        connection.execute(insert(table), rows)


def problem(store: Store, location_id: int, code: str, message: str) -> None:
    """Keep one open finding of ``verify`` for a location; ``code`` "" clears it."""
    table = models.finding
    with store.transaction() as connection:
        connection.execute(delete(table).where(table.c.location_id == location_id, table.c.source == "verify"))
        row = connection.execute(select(models.location).where(_L.id == location_id)).first()
        if code and row is not None:
            owner = {"artifact_id": row.artifact_id, "location_id": location_id}
            facts = {"code": code, "severity": "error", "message": message, "source": "verify", "at": now()}
            connection.execute(insert(table), {**owner, **facts})
