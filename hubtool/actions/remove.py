"""``rm``: into the trash, or for good, or only out of the library. What belongs to a file goes with it; every step is journalled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubtool.actions import moving
from hubtool.actions.choosing import choose_places
from hubtool.actions.companions import companions
from hubtool.errors import HubtoolError
from hubtool.registry import browse, journal, placing
from hubtool.registry.records import Place, Reader, Row
from hubtool.registry.store import Store

TRASH, DELETE, FORGET = "trash", "delete", "forget"
_AFTER = {TRASH: "trashed", DELETE: "superseded", FORGET: "superseded"}


@dataclass(frozen=True, slots=True)
class Removal:
    """One location to remove, with the files that go with it."""

    row: Row
    place: Place
    beside: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.row.id,
            "path": self.place.path,
            "state": self.place.state,
            "size": self.place.size,
            "with": list(self.beside),
        }


@dataclass(slots=True)
class Outcome:
    """What became of a removal: ``journal`` is the id for ``undo``; ``failed`` maps paths to reasons."""

    removed: list[str] = field(default_factory=list)
    failed: dict[str, HubtoolError] = field(default_factory=dict)
    journal: str | None = None

    def to_json(self) -> dict[str, Any]:
        failed = {path: error.to_json() for path, error in self.failed.items()}
        return {"removed": self.removed, "failed": failed, "journal": self.journal}


def plan(reader: Reader, words: Sequence[str], how: str) -> list[Removal]:
    """Every location of the chosen artifacts; of those named by a path, that one. Offline files can only be forgotten."""
    indexed = _indexed(reader) if how != FORGET else set()
    found = []
    for row, place in choose_places(reader, words):
        if how == FORGET:
            found.append(Removal(row, place))
        elif place.state == "present":
            beside = () if place.link == "folder" else tuple(map(str, companions(Path(place.path), indexed)))
            found.append(Removal(row, place, beside))
    return found


def _indexed(reader: Reader) -> set[str]:
    return {place.path for place in browse.places(reader)}


def remove(store: Store, removals: Sequence[Removal], how: str) -> Outcome:
    """Carry a plan out. A file that cannot be removed stops no other."""
    steps = [step for one in removals for step in _steps(one, how)]
    key = journal.begin(store, "rm", f"{how} {len(removals)} files", [(how, details) for details in steps])
    outcome = Outcome()
    for position, details in enumerate(steps):
        try:
            placing.retire(store, key, position, _act(how, details), _AFTER[how])
            outcome.removed.append(details["path"])
        except HubtoolError as error:
            outcome.failed[details["path"]] = error
    journal.close(store, key, journal.DONE)
    outcome.journal = journal.records(store, 1)[0].uid
    return outcome


def _steps(one: Removal, how: str) -> list[dict[str, Any]]:
    own = {"path": one.place.path, "location": one.place.id, "state": one.place.state}
    return [own, *({"path": path, "location": None} for path in one.beside if how != FORGET)]


def _act(how: str, details: Mapping[str, Any]) -> Mapping[str, Any]:
    path = Path(details["path"])
    if how == TRASH:
        return {**details, "held": moving.trash(path)}
    if how == DELETE:
        moving.delete(path)
    return details
