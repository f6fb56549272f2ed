"""The journal: what was done to user data and files, step by step, so that it can be listed and taken back.

A change of user data and its journal are one transaction. For files the steps are written before the first of them is touched, and marked
one by one: after a crash the journal says what may have happened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, insert, update

from hubtool.errors import NotFound
from hubtool.registry import hub_models
from hubtool.registry.columns import now
from hubtool.registry.records import Reader
from hubtool.registry.store import Store
from hubtool.registry.text import clean, new_uid

OPEN, DONE, UNDONE = "open", "done", "undone"
_J = hub_models.journal.c
_S = hub_models.journal_step.c


@dataclass(frozen=True, slots=True)
class Step:
    """One change: ``op`` is entry, move, trash or forget; ``details`` is what undoing it needs."""

    position: int
    op: str
    done: bool
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """One command that changed something. ``state``: open (interrupted), done or undone."""

    key: int
    uid: str
    command: str
    summary: str
    state: str
    at: int
    undone_at: int | None
    steps: tuple[Step, ...] = ()


def write(connection: Connection, command: str, summary: str, steps: Sequence[tuple[str, Mapping[str, Any]]], state: str) -> int:  # fmt: skip
    """Add a record with its steps; its key. Steps of a record that is ``done`` are done."""
    head = {"uid": new_uid(), "command": command, "summary": clean(summary), "state": state, "at": now()}
    key = int(connection.execute(insert(hub_models.journal).returning(_J.id), head).scalar_one())
    rows = [
        {"journal_id": key, "position": at, "op": op, "done": int(state == DONE), "details": json.dumps(details)}
        for at, (op, details) in enumerate(steps)
    ]
    if rows:
        connection.execute(insert(hub_models.journal_step), rows)
    return key


def begin(store: Store, command: str, summary: str, steps: Sequence[tuple[str, Mapping[str, Any]]]) -> int:
    """Write down what is about to be done to files."""
    with store.transaction() as connection:
        return write(connection, command, summary, steps, OPEN)


def mark(connection: Connection, key: int, position: int, details: Mapping[str, Any]) -> None:
    """A step has been done; ``details`` may say more than when it was planned."""
    values = {"done": 1, "details": json.dumps(details)}
    connection.execute(
        update(hub_models.journal_step).where(_S.journal_id == key, _S.position == position).values(**values)
    )


def close(store: Store, key: int, state: str) -> None:
    """The command has ended (``done``), or was taken back (``undone``)."""
    values = {"state": state, **({"undone_at": now()} if state == UNDONE else {})}
    with store.transaction() as connection:
        connection.execute(update(hub_models.journal).where(_J.id == key).values(**values))


def records(reader: Reader, limit: int = 50) -> list[Record]:
    """The newest records, without their steps; the newest first."""
    sql = "SELECT id, uid, command, summary, state, at, undone_at FROM journal ORDER BY id DESC LIMIT :limit"
    return [Record(*row) for row in reader.rows(sql, {"limit": limit})]


def record(reader: Reader, ref: str | None = None) -> Record:
    """The record that an id or its beginning names, with its steps; None: the newest that was not undone. Raises NotFound."""
    where = "state <> 'undone'" if ref is None else "uid >= :ref AND uid <= :end"
    sql = f"SELECT id, uid, command, summary, state, at, undone_at FROM journal WHERE {where} ORDER BY id DESC LIMIT 2"
    rows = reader.rows(sql, {} if ref is None else {"ref": ref.lower(), "end": ref.lower() + "z" * 20})
    if not rows or (ref is not None and len(rows) > 1):
        said = "there is nothing to undo" if ref is None else f"the journal has no single record {ref!r}"
        raise NotFound(said, hint="hubtool log")
    found = rows[0]
    steps = reader.rows(
        "SELECT position, op, done, details FROM journal_step WHERE journal_id = :key ORDER BY position",
        {"key": found[0]},
    )
    listed = tuple(Step(row[0], row[1], bool(row[2]), json.loads(row[3])) for row in steps)
    return replace(Record(*found), steps=listed)
