"""What commands that move and remove files tell the library, one short transaction a file, together with its step of the journal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select, update

from hubtool.registry import journal, models, scanning
from hubtool.registry.columns import LIVE, place_values
from hubtool.registry.records import FileStat, LocationRecord, RootRecord
from hubtool.registry.store import Store
from hubtool.registry.writing import retire_path

_L = models.location.c


def retire(store: Store, key: int, position: int, details: Mapping[str, Any], state: str) -> None:
    """A step of a removal has been done: its location (``details["location"]``, None for a file of no artifact) takes ``state``."""
    with store.transaction() as connection:
        if details.get("location") is not None:
            connection.execute(update(models.location).where(_L.id == details["location"]).values(state=state))
        journal.mark(connection, key, position, details)


def revive(store: Store, location: int | None, state: str = "present") -> None:
    """A location is back, unless its path has been taken by another row."""
    if location is None:
        return
    with store.transaction() as connection:
        row = connection.execute(select(models.location).where(_L.id == location)).first()
        if row is None:
            return
        held = (_L.root_id == row.root_id, _L.relpath == row.relpath, _L.state.in_(LIVE), _L.id != row.id)
        if connection.execute(select(_L.id).where(*held)).first() is None:
            connection.execute(update(models.location).where(_L.id == location).values(state=state, missing_since=None))


def relocate(store: Store, location: int | None, root: RootRecord, relpath: bytes, stat: FileStat) -> None:
    """A location has a new path; its row, and all that hangs on its artifact, stays."""
    if location is None:
        return
    with store.transaction() as connection:
        row = connection.execute(select(models.location).where(_L.id == location)).one()
        place = LocationRecord(root.id, relpath, stat, row.link)
        retire_path(connection, place, keep=location)
        connection.execute(update(models.location).where(_L.id == location).values(**place_values(place)))


def root_of(store: Store, path: bytes, folder: bytes, device: int, inode: int) -> RootRecord:
    """The root that holds ``path``, the innermost of several; its ``folder`` becomes one where there is none."""
    inside = [root for root in scanning.roots(store) if path.startswith(root.path.rstrip(b"/") + b"/")]
    if inside:
        return max(inside, key=lambda root: len(root.path))
    return scanning.add_root(store, folder, device, inode, walked=False)
