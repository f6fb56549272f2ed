"""What of a fine-tune an adapter cannot hold: known before anything is decomposed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hubtool.layouts.emission import Loss
from hubtool.ops.distill import tables
from hubtool.ops.distill.tables import Table
from hubtool.ops.extract import changes
from hubtool.ops.extract.planning import Task
from hubtool.ops.extract.pool import Room
from hubtool.tensors.dtypes import FLOATS

_CHOSEN = "not asked for"  # how ``units.sort`` begins its reason for what the user left out
_AVERAGE = "model_ema."  # a training checkpoint's running mean, which programs do not read
_SHOWN = 3


def losses(task: Task, found: Sequence[Table]) -> list[Loss]:
    """One loss for every reason and component. Reads what is not decomposed: norms, biases, tables, the VAE."""
    room = Room("cpu")
    with room.sources:
        left = [*_left(task, found, room)]
        unknown = [*_unknown(task, room)]
    rows = [] if task.request.kind == "full" else [*_rows(found)]
    return [*left, *rows, *_alone(task), *unknown]


def _left(task: Task, found: Sequence[Table], room: Room) -> Iterator[Loss]:
    held = {table.key for table in found}
    for reason, keys in task.sorted.left.items():
        if reason.startswith(_CHOSEN):
            continue
        own = changes.changed(task.pairs, (key for key in keys if key not in held), room)
        for component in dict.fromkeys(name.partition(".")[0] for name in own):
            mine = [name for name in own if name.partition(".")[0] == component]
            yield Loss(f"{component}: {_listed(mine)} changed", f"left out: {reason}")


def _rows(found: Sequence[Table]) -> Iterator[Loss]:
    for table in found:
        old = tables.changed(table)
        if old:
            reason = "an adapter brings new tokens and has no place for other vectors of old ones (--as full)"
            yield Loss(f"{table.component}: vectors of {_listed(old, 'old tokens')} changed", reason)


def _alone(task: Task) -> Iterator[Loss]:
    """Parameters that a common component has on the tuned side only. A component that the base lacks as a whole is no loss: see ``absent``."""
    common = set(task.pairs.components())
    tuned = dict(task.tuned.parameters())
    for component in task.pairs.components():
        own = [key for key in task.pairs.only_tuned if key[0] == component and tuned[key].dtype in FLOATS]
        if own and component in common:
            yield Loss(f"{component}: {_listed(['.'.join(key) for key in own])}", "only the tuned pipeline has it")


def _unknown(task: Task, room: Room) -> Iterator[Loss]:
    """Tensors that no table of the family has a place for: a language model that serves as text encoder, a safety checker."""
    before, after = task.base.checkpoint.extras, task.tuned.checkpoint.extras
    common = [key for key in after if key in before and after[key].shape == before[key].shape]
    own = [key for key in common if not key.startswith(_AVERAGE) and changes.differ(before[key], after[key], room)]
    for part in dict.fromkeys(key.partition("/")[0] if "/" in key else "" for key in own):
        mine = [key for key in own if key.startswith(f"{part}/" if part else "")]
        reason = f"{task.pairs.family} has no table that names its modules"
        yield Loss(f"{part + ': ' if part else ''}{_listed(mine, 'tensors')} changed", reason)


def absent(task: Task) -> list[str]:
    """Components that only the tuned pipeline has."""
    common = task.pairs.components()
    return [name for name in dict.fromkeys(key[0] for key in task.pairs.only_tuned) if name not in common]


def _listed(names: Sequence[str], what: str = "parameters") -> str:
    if len(names) <= _SHOWN:
        return ", ".join(names)
    return f"{len(names)} {what} ({', '.join(names[:_SHOWN])} ...)"
