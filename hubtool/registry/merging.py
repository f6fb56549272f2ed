"""Two artifacts turn out to be the same bytes: everything that hangs on one goes over to the other."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Table, delete, insert, select, update

from hubtool.registry import hub_models, models
from hubtool.registry.columns import now


def merge(connection: Connection, source: int, target: int) -> None:
    """Repoint locations, lineage, findings of locations, claims and user data from ``source`` to ``target``; delete ``source``."""
    for column in (models.location.c.artifact_id, models.lineage.c.child_id, models.lineage.c.parent_id):
        connection.execute(update(column.table).where(column == source).values({column.name: target}))
    finding = models.finding.c
    of_place = (finding.artifact_id == source, finding.location_id.is_not(None))
    connection.execute(update(models.finding).where(*of_place).values(artifact_id=target))
    adopt(connection, models.hash_, source, target, ("algo", "value", "origin"))
    adopt(connection, models.trigger_word, source, target, ("text", "source"))
    adopt(connection, hub_models.hub_origin, source, target, ("endpoint", "repo", "path", "revision"))
    published = hub_models.publication_file
    connection.execute(update(published).where(published.c.artifact_id == source).values(artifact_id=target))
    _merge_entries(connection, source, target)
    connection.execute(delete(models.artifact).where(models.artifact.c.id == source))


def adopt(connection: Connection, table: Table, source: int, target: int, same: tuple[str, ...]) -> None:
    """Copy the rows of ``source`` that ``target`` lacks; ``same`` are the columns that tell. The old rows go with their artifact."""
    there = {tuple(row._mapping[name] for name in same) for row in _rows(connection, table, target)}
    for row in _rows(connection, table, source):
        values = {name: value for name, value in row._mapping.items() if name != "id"}
        if tuple(values[name] for name in same) not in there:
            connection.execute(insert(table), {**values, "artifact_id": target})


def _rows(connection: Connection, table: Table, artifact_id: int) -> list[Any]:
    return list(connection.execute(select(table).where(table.c.artifact_id == artifact_id)))


def _merge_entries(connection: Connection, source: int, target: int) -> None:
    links = models.entry_artifact
    primary = select(links.c.entry_id).where(links.c.artifact_id == target, links.c.role != "previous")
    keep = connection.execute(primary.order_by(links.c.entry_id)).scalar()
    there = set(connection.execute(select(links.c.entry_id).where(links.c.artifact_id == target)).scalars())
    for row in _rows(connection, links, source):
        if keep is None or row.role == "previous":
            if row.entry_id not in there:
                connection.execute(insert(links), {"entry_id": row.entry_id, "artifact_id": target, "role": row.role})
        elif row.entry_id != keep:
            _merge_entry(connection, row.entry_id, keep)


def _merge_entry(connection: Connection, source: int, target: int) -> None:
    """Add the tags, fields, notes and links of one entry to another; what the other says already stays. Nothing is deleted but ``source``."""
    for table, same in (
        (models.entry_tag, ("tag_id", "source")),
        (models.meta, ("field", "source")),
        (models.entry_artifact, ("artifact_id",)),
    ):
        rows = [row._mapping for row in connection.execute(select(table).where(table.c.entry_id.in_((source, target))))]
        there = {tuple(row[name] for name in same) for row in rows if row["entry_id"] == target}
        new = [{**row, "entry_id": target} for row in rows if tuple(row[name] for name in same) not in there]
        if new:
            connection.execute(insert(table), new)
    old, kept = (
        connection.execute(select(models.entry).where(models.entry.c.id == key)).one() for key in (source, target)
    )
    connection.execute(update(models.entry).where(models.entry.c.id == target).values(**_joined(old, kept)))
    connection.execute(delete(models.entry).where(models.entry.c.id == source))


def _joined(old: Any, kept: Any) -> dict[str, Any]:
    notes = [text for text in dict.fromkeys((kept.notes, old.notes)) if text]
    searched = [text for text in dict.fromkeys((kept.search_text, old.search_text)) if text]
    return {
        "title": kept.title or old.title,
        "notes": "\n".join(notes) or None,
        "rating": old.rating if kept.rating is None else kept.rating,
        "favorite": max(kept.favorite, old.favorite),
        "search_text": "\n".join(searched),
        "updated_at": now(),
    }
