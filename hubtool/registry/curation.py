"""What a person says about artifacts: title, notes, rating, favourite, tags. It hangs on the artifact, never on a path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from hubtool.registry import journal, models
from hubtool.registry.columns import now
from hubtool.registry.store import Store
from hubtool.registry.text import clean, fold, new_uid

USER = "user"
_E = models.entry.c
_L = models.entry_artifact.c
_T = models.tag.c


@dataclass(frozen=True, slots=True)
class Said:
    """The user layer of one artifact; empty when nothing was said."""

    title: str | None = None
    notes: str | None = None
    rating: int | None = None
    favorite: bool = False
    tags: tuple[str, ...] = ()

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Said:
        """From the JSON of a journal or an export."""
        return cls(**{**values, "tags": tuple(values.get("tags", ()))})

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tags": list(self.tags)}


Edit = Callable[[Said], Said]


@dataclass(frozen=True, slots=True)
class Change:
    """What an edit did to one artifact (``uid``)."""

    uid: str
    before: Said
    after: Said


def said(connection: Connection, artifact: int) -> Said:
    """What a person said about an artifact."""
    entry = _entry(connection, artifact)
    if entry is None:
        return Said()
    mine = models.entry_tag.c
    tags = (
        select(_T.name)
        .join(models.entry_tag, mine.tag_id == _T.id)
        .where(mine.entry_id == entry.id, mine.source == USER)
    )
    names = tuple(connection.execute(tags.order_by(_T.name_key)).scalars())
    return Said(entry.title or None, entry.notes or None, entry.rating, bool(entry.favorite), names)


def _entry(connection: Connection, artifact: int) -> Any:
    query = select(models.entry).join(models.entry_artifact, _L.entry_id == _E.id)
    return connection.execute(query.where(_L.artifact_id == artifact, _L.role != "previous").order_by(_E.id)).first()


def read(store: Store, artifacts: Iterable[int]) -> dict[int, Said]:
    """The user layer of many artifacts."""
    with store.reading() as connection:
        return {key: said(connection, key) for key in artifacts}


def change(
    store: Store, artifacts: Sequence[tuple[int, str]], edits: Callable[[int], Edit], command: str
) -> list[Change]:
    """Apply to each (key, uid) the edit that ``edits`` gives for its key, in one transaction with its journal; what changed."""
    changes = []
    with store.transaction() as connection:
        for key, uid in artifacts:
            before = said(connection, key)
            after = edits(key)(before)
            if after != before:
                _write(connection, key, after)
                changes.append(Change(uid, before, said(connection, key)))
        if changes:
            steps = [
                ("entry", {"artifact": one.uid, "before": one.before.to_json(), "after": one.after.to_json()})
                for one in changes
            ]
            journal.write(connection, command, f"{command} {len(changes)} artifacts", steps, journal.DONE)
    return changes


def preview(store: Store, artifacts: Sequence[tuple[int, str]], edits: Callable[[int], Edit]) -> list[Change]:
    """What ``change`` would do."""
    with store.reading() as connection:
        found = [(uid, said(connection, key), edits(key)) for key, uid in artifacts]
    changes = [Change(uid, before, edit(before)) for uid, before, edit in found]
    return [one for one in changes if one.before != one.after]


def restore(connection: Connection, details: Mapping[str, Any]) -> str | None:
    """Take one change back; the reason why it is not, where somebody has changed the same artifact since."""
    uid = details["artifact"]
    key = connection.execute(select(models.artifact.c.id).where(models.artifact.c.uid == uid)).scalar()
    if key is None:
        return f"{uid} is not in the library any more"
    if said(connection, key) != Said.read(details["after"]):
        return f"{uid} was changed again since"
    _write(connection, key, Said.read(details["before"]))
    return None


def _write(connection: Connection, artifact: int, new: Said) -> None:
    entry = _entry(connection, artifact)
    title, notes = (clean(text) if text else None for text in (new.title, new.notes))
    values = {
        "title": title,
        "notes": notes,
        "rating": new.rating,
        "favorite": int(new.favorite),
        "search_text": fold(f"{title or ''}\n{notes or ''}"),
        "updated_at": now(),
    }
    if entry is None:
        made = insert(models.entry).returning(_E.id)
        key = connection.execute(made, {**values, "uid": new_uid(), "added_at": now()}).scalar_one()
        connection.execute(insert(models.entry_artifact), {"entry_id": key, "artifact_id": artifact, "role": "primary"})
    else:
        key = entry.id
        connection.execute(update(models.entry).where(_E.id == key).values(**values))
    _write_tags(connection, key, new.tags)


def _write_tags(connection: Connection, entry: int, names: Iterable[str]) -> None:
    mine = models.entry_tag.c
    connection.execute(delete(models.entry_tag).where(mine.entry_id == entry, mine.source == USER))
    unique = {fold(name): clean(name) for name in names}
    rows = [
        {"entry_id": entry, "tag_id": _tag(connection, folded, name), "source": USER} for folded, name in unique.items()
    ]
    if rows:
        connection.execute(insert(models.entry_tag), rows)


def _tag(connection: Connection, folded: str, name: str) -> int:
    known = connection.execute(select(_T.id).where(_T.name_key == folded)).scalar()
    made = insert(models.tag).returning(_T.id)
    return int(
        known if known is not None else connection.execute(made, {"name": name, "name_key": folded}).scalar_one()
    )
