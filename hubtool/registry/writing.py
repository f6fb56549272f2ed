"""Writing new and changed files: one transaction per batch, one statement per table for the plain ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, delete, insert, or_, select, update

from hubtool.registry import models
from hubtool.registry.columns import LIVE, artifact_values, fact_rows, now, place_values, signed
from hubtool.registry.records import ArtifactRecord, FileStat, LocationRecord
from hubtool.registry.store import Store
from hubtool.registry.text import new_uid

_L = models.location.c
_A = models.artifact.c


@dataclass(frozen=True, slots=True)
class NewFile:
    """A location to write, and what its bytes are."""

    location: LocationRecord
    artifact: ArtifactRecord


def write(store: Store, files: Sequence[NewFile]) -> list[str]:
    """Write at most a batch of files in one transaction; what became of each: ``added``, ``changed``, ``moved`` or ``unchanged``."""
    with store.transaction() as connection:
        special = _special(connection, files)
        plain = [file for at, file in enumerate(files) if at not in special]
        _insert_plain(connection, plain)
        return [_write_one(connection, file) if at in special else "added" for at, file in enumerate(files)]


def _special(connection: Connection, files: Sequence[NewFile]) -> set[int]:
    """Positions of the files that meet a row: their path, their inode, or the quick identity of a missing file is known."""
    paths = _values(connection, _L.relpath, [file.location.relpath for file in files], _L.state != "superseded")
    inodes = _values(connection, _L.inode, [signed(file.location.stat).inode for file in files], _L.state == "present")
    quick = _missing_quick_ids(connection, [file.artifact.quick_id for file in files if file.artifact.quick_id])
    special: set[int] = set()
    for at, file in enumerate(files):
        inode = signed(file.location.stat).inode
        if file.location.relpath in paths or inode in inodes or file.artifact.quick_id in quick:
            special.add(at)
        inodes.add(inode)
    return special


def _values(connection: Connection, column: Any, wanted: list[Any], condition: Any) -> set[Any]:
    return set(connection.execute(select(column).where(column.in_(wanted), condition)).scalars())


def _missing_quick_ids(connection: Connection, wanted: list[str]) -> set[str]:
    query = select(_A.quick_id).join(models.location, _L.artifact_id == _A.id)
    found = connection.execute(query.where(_A.quick_id.in_(wanted), _L.state == "missing")).scalars()
    return {quick for quick in found if quick is not None}


def _insert_plain(connection: Connection, files: Sequence[NewFile]) -> None:
    if not files:
        return
    rows = [{**artifact_values(file.artifact), "uid": new_uid(), "added_at": now()} for file in files]
    returning = insert(models.artifact).returning(_A.id, sort_by_parameter_order=True)
    keys = list(connection.execute(returning, rows).scalars())
    places = [
        {**place_values(file.location), "artifact_id": key, "first_seen_at": now(), "verified_at": None}
        for key, file in zip(keys, files, strict=True)
    ]
    connection.execute(insert(models.location), places)
    _insert_facts(connection, [(key, file.artifact) for key, file in zip(keys, files, strict=True)])


def _insert_facts(connection: Connection, pairs: Sequence[tuple[int, ArtifactRecord]]) -> None:
    collected: dict[str, list[dict[str, Any]]] = {}
    for key, record in pairs:
        for table, rows in fact_rows(key, record).items():
            collected.setdefault(table, []).extend(rows)
    for table, rows in collected.items():
        if rows:
            connection.execute(insert(models.metadata.tables[table]), rows)


def _write_one(connection: Connection, file: NewFile) -> str:
    place = file.location
    current = _holder(connection, place)
    if current is not None and FileStat(current.size, current.mtime_ns, current.inode, current.device).same(
        signed(place.stat)
    ):
        return "unchanged"  # a scan running beside this one was faster
    if (twin := _same_inode(connection, place)) is not None:
        retire_path(connection, place)
        _insert_location(connection, place, twin.artifact_id, twin.verified_at)
    elif current is None and (lost := _lost(connection, file)) is not None:
        retire_path(connection, place, keep=lost.id)
        connection.execute(
            update(models.location).where(_L.id == lost.id).values(**place_values(place), verified_at=None)
        )
        refresh(connection, lost.artifact_id, file.artifact)
        return "moved"
    else:
        _replace(connection, file)
    return "added" if current is None else "changed"


def _replace(connection: Connection, file: NewFile) -> None:
    row = {**artifact_values(file.artifact), "uid": new_uid(), "added_at": now()}
    artifact_id = connection.execute(insert(models.artifact).returning(_A.id), row).scalar_one()
    _insert_facts(connection, [(artifact_id, file.artifact)])
    before = retire_path(connection, file.location)
    _insert_location(connection, file.location, artifact_id, None)
    if before is not None:
        inherit(connection, before.artifact_id, artifact_id)


def _holder(connection: Connection, place: LocationRecord) -> Any:
    """The live row of this path, if any."""
    at = and_(_L.root_id == place.root_id, _L.relpath == place.relpath, _L.state.in_(LIVE))
    return connection.execute(select(models.location).where(at)).first()


def retire_path(connection: Connection, place: LocationRecord, keep: int | None = None) -> Any:
    """Supersede whatever rows hold this path, but for ``keep``; the last of them, or None."""
    at = and_(_L.root_id == place.root_id, _L.relpath == place.relpath, _L.state.in_((*LIVE, "missing")))
    rows = [row for row in connection.execute(select(models.location).where(at).order_by(_L.id)) if row.id != keep]
    if rows:
        mine = _L.id.in_([row.id for row in rows])
        connection.execute(update(models.location).where(mine).values(state="superseded"))
    return rows[-1] if rows else None


def _same_inode(connection: Connection, place: LocationRecord) -> Any:
    """A present location of the very same file: a hard link, or what a symbolic link leads to."""
    if place.link == "folder":
        return None
    stat = signed(place.stat)
    same = and_(_L.inode == stat.inode, _L.device == stat.device, _L.size == stat.size, _L.mtime_ns == stat.mtime_ns)
    elsewhere = or_(_L.root_id != place.root_id, _L.relpath != place.relpath)
    return connection.execute(
        select(models.location).where(same, elsewhere, _L.state == "present", _L.link != "folder")
    ).first()


def _lost(connection: Connection, file: NewFile) -> Any:
    """A missing location whose artifact has the same quick identity and lies nowhere else: the file has come back or moved."""
    query = select(models.location).join(models.artifact, _A.id == _L.artifact_id)
    same = and_(_A.quick_id == file.artifact.quick_id, _A.size == file.artifact.size, _L.state == "missing")
    for row in connection.execute(query.where(same).order_by(_L.id.desc())).all():
        alive = select(_L.id).where(_L.artifact_id == row.artifact_id, _L.state.in_(LIVE)).limit(1)
        if connection.execute(alive).first() is None:
            return row
    return None


def _insert_location(connection: Connection, place: LocationRecord, artifact_id: int, verified_at: int | None) -> None:
    row = {**place_values(place), "artifact_id": artifact_id, "first_seen_at": now(), "verified_at": verified_at}
    connection.execute(insert(models.location), row)


def refresh(connection: Connection, artifact_id: int, record: ArtifactRecord) -> None:
    """Replace what an earlier scan found out about an artifact; computed hashes, lineage and user data stay."""
    values = artifact_values(record)
    if record.base_model is None:  # then it may be known from a hub's card
        values = {name: value for name, value in values.items() if name not in ("base_model", "base_key")}
    connection.execute(update(models.artifact).where(_A.id == artifact_id).values(**values))
    found, word, claimed, doc = models.finding.c, models.trigger_word.c, models.hash_.c, models.artifact_doc.c
    connection.execute(delete(models.finding).where(found.artifact_id == artifact_id, found.source == "scan"))
    connection.execute(delete(models.trigger_word).where(word.artifact_id == artifact_id, word.source == "file"))
    connection.execute(delete(models.hash_).where(claimed.artifact_id == artifact_id, claimed.origin == "embedded"))
    connection.execute(delete(models.artifact_doc).where(doc.artifact_id == artifact_id))
    _insert_facts(connection, [(artifact_id, record)])


def inherit(connection: Connection, old: int, new: int) -> None:
    """User data of a file that was rewritten in place goes on to the new bytes; the old ones keep it as ``previous``."""
    links = models.entry_artifact
    mine = connection.execute(select(links).where(links.c.artifact_id == old, links.c.role != "previous")).all()
    for row in mine:
        connection.execute(insert(links), {"entry_id": row.entry_id, "artifact_id": new, "role": row.role})
    if mine:
        connection.execute(update(links).where(links.c.artifact_id == old).values(role="previous"))
