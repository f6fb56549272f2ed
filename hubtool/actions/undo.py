"""``log`` and ``undo``: what commands changed, and taking it back, last step first."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubtool.actions import moving
from hubtool.actions.dates import rfc3339
from hubtool.actions.scan_walk import candidate, file_stat
from hubtool.errors import HubtoolError
from hubtool.registry import curation, journal, placing
from hubtool.registry.journal import Record, Step
from hubtool.registry.records import Reader
from hubtool.registry.store import Store

COLUMNS = ("id", "at", "command", "summary", "state")


def log(reader: Reader, limit: int = 50) -> list[dict[str, Any]]:
    """The newest commands that changed something, the newest first."""
    return [to_json(record) for record in journal.records(reader, limit)]


def to_json(record: Record) -> dict[str, Any]:
    """A row of the log; its steps where they were read."""
    head = {
        "id": record.uid,
        "at": rfc3339(record.at),
        "command": record.command,
        "summary": record.summary,
        "state": record.state,
    }
    steps = [{"op": step.op, "done": step.done, **step.details} for step in record.steps]
    return {**head, "undone_at": rfc3339(record.undone_at), **({"steps": steps} if steps else {})}


@dataclass(slots=True)
class Undone:
    """What was taken back, and what was not, with the reason."""

    record: Record
    undone: int = 0
    left: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**to_json(self.record), "undone": self.undone, "left": self.left}


def undo(store: Store, ref: str | None = None) -> Undone:
    """Take back the command ``ref`` of the journal, or the last one. Raises NotFound, HubtoolError for one that was undone before."""
    record = journal.record(store, ref)
    if record.state == journal.UNDONE:
        raise HubtoolError(f"{record.uid} was undone already", hint="hubtool log")
    result = Undone(record)
    for step in reversed(record.steps):
        if not step.done and not _may_have_happened(step):
            continue
        reason = _take_back(store, step)
        if reason is None:
            result.undone += 1
        else:
            result.left.append(reason)
    if result.undone or not result.left:
        journal.close(store, record.key, journal.UNDONE)
    return result


def _may_have_happened(step: Step) -> bool:
    """Whether a step that an interrupted command did not get to mark may have been done: the disk tells."""
    path = step.details.get("from" if step.op == "move" else "path", "")
    return step.op in ("move", "trash") and not os.path.lexists(path)


def _take_back(store: Store, step: Step) -> str | None:
    try:
        return _UNDO[step.op](store, step.details)
    except HubtoolError as error:
        return f"{error.path or ''}: {error.message}".removeprefix(": ")


def _entry(store: Store, details: Mapping[str, Any]) -> str | None:
    with store.transaction() as connection:
        return curation.restore(connection, details)


def _trash(store: Store, details: Mapping[str, Any]) -> str | None:
    path = Path(details["path"])
    held = details.get("held") or next(map(str, moving.trashed(path)), None)
    if held is None:
        return f"{path}: take it out of the system's trash yourself, then: hubtool scan"
    moving.restore(Path(held), path)
    placing.revive(store, details["location"])
    return None


def _delete(_store: Store, details: Mapping[str, Any]) -> str | None:
    return f"{details['path']} was deleted for good"


def _forget(store: Store, details: Mapping[str, Any]) -> str | None:
    placing.revive(store, details["location"], details["state"])
    return None


def _move(store: Store, details: Mapping[str, Any]) -> str | None:
    source, target = Path(details["to"]), Path(details["from"])
    moving.move(source, target)
    settle(store, details["location"], target)
    return None


def settle(store: Store, location: int | None, path: Path) -> None:
    """Tell the library where a moved file lies now."""
    if location is None:
        return
    name, folder = os.fsencode(path.name), os.fsencode(path.parent)
    above, found = os.stat(folder), candidate(folder, name)
    root = placing.root_of(store, os.fsencode(path), folder, above.st_dev, above.st_ino)
    relpath = os.fsencode(path)[len(root.path.rstrip(b"/")) + 1 :]
    placing.relocate(store, location, root, relpath, found.stat if found else file_stat(path.lstat()))


_UNDO = {"entry": _entry, "trash": _trash, "delete": _delete, "forget": _forget, "move": _move}
