"""Rows for a library without files behind them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import insert, select

from hubtool.registry import models, scanning
from hubtool.registry.records import ArtifactRecord, FileStat, LocationRecord, RootRecord
from hubtool.registry.store import Store
from hubtool.registry.text import fold, new_uid
from hubtool.registry.writing import NewFile, write


def add_root(store: Store, path: bytes = b"/models") -> RootRecord:
    return scanning.add_root(store, path, 1, 2)


def new_file(root: RootRecord, name: bytes, inode: int, **facts: Any) -> NewFile:
    """A file of 100 bytes (or ``size``), whose quick identity is its inode unless told otherwise."""
    size = facts.pop("size", 100)
    record = ArtifactRecord(size, facts.pop("format", "safetensors"), **{"quick_id": f"q{inode}", **facts})
    return NewFile(LocationRecord(root.id, name, FileStat(size, 5, inode, 1)), record)


def add(store: Store, *files: NewFile) -> list[str]:
    return write(store, files)


def artifact_of(store: Store, name: bytes) -> int:
    """Key of the artifact whose live location has this relative path."""
    rows = store.rows(
        "SELECT artifact_id FROM location WHERE relpath = :name AND state IN ('present', 'offline')", {"name": name}
    )
    return int(rows[0][0])


def tag(store: Store, artifact_id: int, names: Iterable[str], title: str = "", notes: str = "") -> None:
    """User data for an artifact, written straight into the tables."""
    with store.transaction() as connection:
        values = {
            "uid": new_uid(),
            "title": title,
            "notes": notes,
            "search_text": fold(f"{title}\n{notes}"),
            "added_at": 0,
            "updated_at": 0,
        }
        entry = connection.execute(insert(models.entry).returning(models.entry.c.id), values).scalar_one()
        connection.execute(
            insert(models.entry_artifact), {"entry_id": entry, "artifact_id": artifact_id, "role": "primary"}
        )
        for name in names:
            known = connection.execute(select(models.tag.c.id).where(models.tag.c.name_key == fold(name))).scalar()
            made = {"name": name, "name_key": fold(name)}
            key = known or connection.execute(insert(models.tag).returning(models.tag.c.id), made).scalar_one()
            connection.execute(insert(models.entry_tag), {"entry_id": entry, "tag_id": key, "source": "user"})
