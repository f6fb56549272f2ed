"""The book-keeping of a scan: roots, the bulk load of known locations, moves and states, in short transactions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import and_, delete, func, insert, select, update

from hubtool.registry import models
from hubtool.registry.columns import batches, now, place_values, stat_values
from hubtool.registry.records import FileStat, KnownLocation, LocationRecord, RootRecord
from hubtool.registry.store import Store
from hubtool.registry.text import display, fold, signed64
from hubtool.registry.writing import retire_path

_L = models.location.c
_R = models.root.c


def roots(store: Store) -> list[RootRecord]:
    """Every root, in order of path."""
    with store.reading() as connection:
        return [_root(row) for row in connection.execute(select(models.root).order_by(_R.path))]


def _root(row: Any) -> RootRecord:
    return RootRecord(row.id, bytes(row.path), row.device, row.inode, bool(row.online), bool(row.walked))


def add_root(store: Store, path: bytes, device: int, inode: int, *, walked: bool = True) -> RootRecord:
    """The root at ``path``, made if it is new. ``walked`` turns a folder of single files into one that is scanned whole."""
    text = display(path)
    names = {"path": path, "path_text": text, "path_key": fold(text), "added_at": now()}
    with store.transaction() as connection:
        query = select(models.root).where(_R.path == path)
        if connection.execute(query).first() is None:
            marker = {"device": signed64(device), "inode": signed64(inode), "walked": int(walked)}
            connection.execute(insert(models.root), {**names, **marker})
        elif walked:
            connection.execute(update(models.root).where(_R.path == path).values(walked=1))
        return _root(connection.execute(query).one())


def known(store: Store, root_id: int) -> list[KnownLocation]:
    """Every location of a root that is not superseded, in one bulk load."""
    rows = store.rows(
        "SELECT id, artifact_id, root_id, relpath, size, mtime_ns, inode, device, links, state FROM location "
        "WHERE root_id = :root AND state IN ('present', 'offline', 'missing')",
        {"root": root_id},
    )
    return [KnownLocation(row[0], row[1], row[2], bytes(row[3]), FileStat(*row[4:9]), row[9]) for row in rows]


def set_states(store: Store, location_ids: Sequence[int], state: str) -> None:
    """Set the state of many locations, a batch per transaction."""
    since = now() if state == "missing" else None
    for batch in batches(location_ids):
        with store.transaction() as connection:
            connection.execute(update(models.location).where(_L.id.in_(batch)).values(state=state, missing_since=since))


def finish_root(store: Store, root_id: int, device: int, inode: int) -> None:
    """Note that a root has been walked to the end. The device and inode mark it: another one there later is another disk."""
    with store.transaction() as connection:
        marker = {"device": signed64(device), "inode": signed64(inode)}
        connection.execute(update(models.root).where(_R.id == root_id).values(online=1, last_scan_at=now(), **marker))


def take_offline(store: Store, root_id: int) -> int:
    """Mark a root and its present locations offline; how many there were. Nothing is deleted."""
    with store.transaction() as connection:
        connection.execute(update(models.root).where(_R.id == root_id).values(online=0))
        there = and_(_L.root_id == root_id, _L.state == "present")
        return connection.execute(update(models.location).where(there).values(state="offline")).rowcount


def move(store: Store, pairs: Sequence[tuple[KnownLocation, LocationRecord]]) -> None:
    """Give known locations new paths; the rows, and all that hangs on their artifacts, stay. Swapped names are fine."""
    for batch in batches(pairs):
        with store.transaction() as connection:
            # The unique index covers live rows only: retiring all of them first lets two files swap their names.
            mine = _L.id.in_([old.id for old, _ in batch])
            connection.execute(update(models.location).where(mine).values(state="superseded"))
            for old, new in batch:
                retire_path(connection, new, keep=old.id)
                connection.execute(update(models.location).where(_L.id == old.id).values(**place_values(new)))


def touch(store: Store, pairs: Sequence[tuple[KnownLocation, FileStat]]) -> None:
    """New stat, same quick identity: keep the row, queue the bytes to be hashed again."""
    for batch in batches(pairs):
        with store.transaction() as connection:
            for old, stat in batch:
                values: dict[str, Any] = {
                    **stat_values(stat),
                    "state": "present",
                    "missing_since": None,
                    "verified_at": None,
                }
                connection.execute(update(models.location).where(_L.id == old.id).values(**values))


def quick_ids(store: Store, artifact_ids: Sequence[int]) -> dict[int, str | None]:
    """The quick identity of artifacts, by key."""
    found: dict[int, str | None] = {}
    for batch in batches(list(artifact_ids)):
        query = select(models.artifact.c.id, models.artifact.c.quick_id).where(models.artifact.c.id.in_(batch))
        with store.reading() as connection:
            found.update((row.id, row.quick_id) for row in connection.execute(query))
    return found


def absorb(store: Store, root: RootRecord) -> None:
    """Take over the locations of folders below ``root`` of which single files were named before: one path, one row."""
    prefix = root.path.rstrip(b"/") + b"/"
    for small in roots(store):
        if small.walked or not (small.path + b"/").startswith(prefix) or small.id == root.id:
            continue
        inner = (small.path + b"/")[len(prefix) :]
        pairs = [(old, LocationRecord(root.id, inner + old.relpath, old.stat)) for old in known(store, small.id)]
        move(store, pairs)
        set_states(store, [old.id for old, _ in pairs if old.state == "missing"], "missing")
        with store.transaction() as connection:
            left = select(_L.id).where(_L.root_id == small.id).limit(1)
            if connection.execute(left).first() is None:
                connection.execute(delete(models.root).where(_R.id == small.id))


def count_missing(store: Store, location_ids: Sequence[int]) -> int:
    """How many of these locations are missing now."""
    total = 0
    for batch in batches(location_ids):
        with store.reading() as connection:
            query = select(func.count()).where(_L.id.in_(batch), _L.state == "missing")
            total += connection.execute(query).scalar_one()
    return total
