"""Compares tensors in tiles: each is read once, and never held whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hubtool.ops.diff.report import OTHER, Difference, Entry, Moments, Unlike, unlike_shapes
from hubtool.ops.extract import pool
from hubtool.ops.extract.pairing import same_matrix
from hubtool.ops.extract.pool import Room
from hubtool.ops.sides import Side
from hubtool.tensors import expr as e
from hubtool.tensors.dtypes import TORCH_NAME, numel
from hubtool.tensors.expr import Expr

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Job:
    """Two tensors of one name and size; ``second`` is ``first`` where only one file has it."""

    name: str
    component: str
    first: Expr
    second: Expr


def checkpoints(first: Side, second: Side, workers: int | None, progress: Progress | None) -> Difference:
    """Parameters by canonical names; what belongs to no component by its own key."""
    return compare("checkpoints", first.family, _named(first), _named(second), workers, progress)


def _named(side: Side) -> dict[tuple[str, str], Expr]:
    rest = {**side.checkpoint.extras, **side.checkpoint.strays}
    return dict(side.parameters()) | {(OTHER, key): tensor for key, tensor in rest.items()}


def compare(
    kind: str,
    family: str | None,
    first: Mapping[tuple[str, str], Expr],
    second: Mapping[tuple[str, str], Expr],
    workers: int | None = None,
    progress: Progress | None = None,
) -> Difference:
    """Tensors of equal (component, key)."""
    jobs: list[Job] = []
    shapes: list[Unlike] = []
    dtypes: list[Unlike] = []
    for key, before in first.items():
        after = second.get(key)
        if after is None:
            continue
        if not same_matrix(before.shape, after.shape):
            shapes.append(unlike_shapes(named(key), before.shape, after.shape))
            continue
        if before.dtype != after.dtype:
            dtypes.append(Unlike(named(key), before.dtype, after.dtype))
        jobs.append(Job(named(key), key[0], before, e.reshape(after, before.shape)))
    alone = [Job(named(key), key[0], t, t) for key, t in (*_without(first, second), *_without(second, first))]
    entries = pool.run([*jobs, *alone], _entry, _weight, workers=workers, progress=progress, memory=None)
    return Difference(
        kind,
        family,
        tuple(entries[: len(jobs)]),
        tuple(named(key) for key, _ in _without(first, second)),
        tuple(named(key) for key, _ in _without(second, first)),
        tuple(shapes),
        tuple(dtypes),
        _alone(entries[len(jobs) :], len(_without(first, second))),
    )


def _without(
    first: Mapping[tuple[str, str], Expr], second: Mapping[tuple[str, str], Expr]
) -> list[tuple[tuple[str, str], Expr]]:
    return [(key, tensor) for key, tensor in first.items() if key not in second]


def _alone(entries: Sequence[Entry], count: int) -> Moments:
    """What one file has beside zeros of the other; the first ``count`` are the first file's."""
    sizes = [0.0 if entry.component == OTHER else entry.moments.first for entry in entries]
    first, second = sum(sizes[:count]), sum(sizes[count:])
    return Moments(first=first, second=second, change=first + second)


def named(key: tuple[str, str]) -> str:
    """``component.path``; the bare key of what belongs to no component."""
    return key[1] if key[0] in ("", OTHER) else ".".join(key)


def _weight(job: Job) -> int:
    return e.size(job.first) + e.size(job.second)


def _entry(job: Job, room: Room) -> Entry:
    if not numel(job.first.shape):
        return Entry(job.name, job.component, Moments(), True)
    if any(tensor.dtype not in TORCH_NAME for tensor in (job.first, job.second)):
        return _raw(job)
    total, identical = Moments(), job.first.dtype == job.second.dtype
    for _, _, (before, after) in room.tiles(job.first, job.second):
        same = identical and _same_bytes(before, after)
        identical = identical and same
        total += moments(before, before if same else after)
    return Entry(job.name, job.component, total, identical)


def _raw(job: Job) -> Entry:
    """Tensors of packed numbers that torch cannot read: equal bytes or not."""
    from hubtool.tensors.evaluate import to_bytes

    same = job.first.dtype == job.second.dtype and to_bytes(job.first) == to_bytes(job.second)
    nothing = Moments() if same else Moments(change=float("nan"), most=float("nan"))
    return Entry(job.name, job.component, nothing, same, note="packed numbers are compared as bytes")


def _same_bytes(before: Tensor, after: Tensor) -> bool:
    import torch

    return torch.equal(before.view(torch.uint8), after.view(torch.uint8))


def moments(before: Tensor, after: Tensor) -> Moments:
    """Of two flat tensors of one length. fp32 within a tile (fp64 where one is that or an integer), sums in fp64."""
    import torch

    wide = (
        torch.float32 if all(t.is_floating_point() and t.element_size() < 8 for t in (before, after)) else torch.float64
    )
    first, same = before.to(wide), before is after
    square = float(torch.dot(first, first))
    if same:
        return Moments(square, square, square)
    second = after.to(wide)
    change = second - first
    return Moments(
        square,
        float(torch.dot(second, second)),
        float(torch.dot(first, second)),
        float(torch.dot(change, change)),
        float(change.abs().max()),
    )


def values(name: str, component: str, pieces: Sequence[tuple[Tensor, Tensor]]) -> Entry:
    """An entry for tensors that are in memory already."""
    import torch

    flat = [(before.reshape(-1), after.reshape(-1)) for before, after in pieces]
    total = sum((moments(before, after) for before, after in flat), Moments())
    return Entry(name, component, total, all(torch.equal(before, after) for before, after in flat))
