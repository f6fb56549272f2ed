"""Collapse: adapters of any kinds into a checkpoint, all changes summed in fp32 and rounded once; and the way back.

base = Base(open_file("model.safetensors"))
parts = [read(open_file("style.safetensors"), base, Strengths(0.8))]
made, report = plan(base, parts)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hubtool.ops.collapse import output
from hubtool.ops.collapse.base import Base, document
from hubtool.ops.collapse.match import Account, Shares, match
from hubtool.ops.collapse.parts import Part, read
from hubtool.ops.collapse.shares import changed
from hubtool.ops.plan import Plan

__all__ = ["Account", "Base", "Part", "Report", "Shares", "plan", "read"]


@dataclass(frozen=True, slots=True)
class Report:
    """What a collapse does. ``shares``: stored key -> the changes of it; ``undone``: they are taken out of it."""

    base: Mapping[str, Any]
    accounts: tuple[Account, ...]
    shares: Mapping[str, tuple[Any, ...]]
    tensors: int
    undone: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "base": dict(self.base),
            "adapters": [account.to_json() for account in self.accounts],
            "changed": len(self.shares),
            "untouched": self.tensors - len(self.shares),
            "undone": self.undone,
        }


def plan(
    base: Base,
    parts: Sequence[Part],
    *,
    container: str | None = None,
    undo: bool = False,
    allow_mismatch: bool = False,
) -> tuple[Plan, Report]:
    """What collapsing ``parts`` into ``base`` writes, and what becomes of every module. Nothing but headers (and alphas) is read.

    ``container``: ``safetensors`` or ``torch-zip`` where it shall not be the base's; ``undo``: the base is the result, and the changes
    are taken out of it. Raises ``ConversionError`` for an adapter that matches nothing, ``ShapeMismatch`` naming module and shapes,
    ``Unsupported`` for quantised weights and for what cannot be undone.
    """
    shares, accounts = match(base, parts, allow_mismatch=allow_mismatch)
    changes = {key: changed(base.tensors[key], own, inverse=undo) for key, own in shares.items()}
    made = output.plan(base, changes, container, undone=undo)
    notes = [f"{part.name}: {note}" for part in parts for note in part.notes]
    report = Report(
        document(base), tuple(accounts), {key: tuple(own) for key, own in shares.items()}, len(base.tensors), undo
    )
    return _noted(made, notes), report


def _noted(made: Plan, notes: Sequence[str]) -> Plan:
    from dataclasses import replace

    return replace(made, notes=(*made.notes, *notes))
