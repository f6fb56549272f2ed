"""Which artifact was made from which, by what operation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, insert

from hubtool.registry import models
from hubtool.registry.columns import now
from hubtool.registry.store import Store
from hubtool.registry.text import clean


@dataclass(frozen=True, slots=True)
class Parent:
    """An input of an operation: its artifact where the library knows it, and always a name (sha256, or path) that outlives it."""

    ref: str
    artifact_id: int | None = None
    strength: float | None = None


def record(store: Store, child: int, parents: Sequence[Parent], op: str, params: Mapping[str, Any], tool: str) -> None:
    """Replace the lineage of an artifact: ``parents`` in order, the same ``op`` and ``params`` (JSON) on each edge."""
    text = json.dumps(dict(params), sort_keys=True, default=str)
    common = {"child_id": child, "op": op, "params": text, "tool": tool, "at": now()}
    rows = [
        {
            **common,
            "parent_id": parent.artifact_id,
            "parent_ref": clean(parent.ref),
            "position": at,
            "strength": parent.strength,
        }
        for at, parent in enumerate(parents)
        if parent.artifact_id != child  # a conversion that changed nothing is not its own parent
    ]
    with store.transaction() as connection:
        connection.execute(delete(models.lineage).where(models.lineage.c.child_id == child, models.lineage.c.op == op))
        if rows:
            connection.execute(insert(models.lineage), rows)
