"""Compares two adapters module by module in what they do to the base weight, whatever layouts, algorithms and ranks they have."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hubtool.adapters.ir import Adapter, ModuleKey, Patch
from hubtool.adapters.low_rank import LowRank
from hubtool.adapters.promote import to_lora
from hubtool.errors import ShapeMismatch, Unsupported
from hubtool.ops.diff import tensors
from hubtool.ops.diff.report import Angles, Difference, Entry, Moments, Unlike, unlike_shapes
from hubtool.ops.extract import pool
from hubtool.ops.extract.pairing import same_matrix
from hubtool.ops.extract.pool import Room
from hubtool.tensors.dtypes import numel
from hubtool.tensors.evaluate import compute, to_bytes
from hubtool.tensors.expr import Expr

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int], None]
_BLOCK = 1 << 20  # elements of a weight's change that are formed at once
_SMALLEST = 1e-6  # of the largest singular value: directions below are rounding


@dataclass(frozen=True, slots=True)
class Job:
    """A module of both adapters; None where one does not have it."""

    key: ModuleKey
    first: Patch | None
    second: Patch | None


Result = Entry | Moments | str  # of a module of both, of a module of one, why it cannot be told


def compare(first: Adapter, second: Adapter, workers: int | None, progress: Progress | None) -> Difference:
    """Changes of the base weights, and token embeddings."""
    jobs, shapes = _jobs(first, second)
    results = list(zip(jobs, pool.run(jobs, _compared, _weight, workers=workers, progress=progress), strict=True))
    tokens = tensors.compare("", None, _tokens(first), _tokens(second))
    alone = [result for _, result in results if isinstance(result, Moments)]
    return Difference(
        kind="adapters",
        family=first.family or second.family,
        entries=(*(result for _, result in results if isinstance(result, Entry)), *tokens.entries),
        only_first=(*(tensors.named(job.key) for job in jobs if job.second is None), *tokens.only_first),
        only_second=(*(tensors.named(job.key) for job in jobs if job.first is None), *tokens.only_second),
        shapes=(*shapes, *tokens.shapes),
        dtypes=tuple(_dtypes(jobs)),
        alone=sum(alone, Moments()),
        unknown={tensors.named(job.key): result for job, result in results if isinstance(result, str)},
    )


def _jobs(first: Adapter, second: Adapter) -> tuple[list[Job], list[Unlike]]:
    jobs: list[Job] = []
    shapes: list[Unlike] = []
    for key in dict.fromkeys((*first.patches, *second.patches)):
        job = Job(key, first.patches.get(key), second.patches.get(key))
        mine, other = (None if patch is None else patch.weight_shape for patch in (job.first, job.second))
        if mine is not None and other is not None and not same_matrix(mine, other) and _sizes(job):
            shapes.append(unlike_shapes(tensors.named(key), mine, other))
        else:
            jobs.append(job)
    return jobs, shapes


def _sizes(job: Job) -> bool:
    """Whether the sizes differ; kinds that flatten a convolution tell another shape of the same size."""
    return job.first is not None and job.second is not None and job.first.sizes != job.second.sizes


def _tokens(adapter: Adapter) -> dict[tuple[str, str], Expr]:
    return {(one.encoder or "", one.token or "(token)"): one.vectors for one in adapter.embeddings}


def _dtypes(jobs: Sequence[Job]) -> list[Unlike]:
    found = []
    for job in jobs:
        if job.first is not None and job.second is not None:
            mine, other = (", ".join(sorted({t.dtype for _, t in p.roles()})) for p in (job.first, job.second))
            if mine != other:
                found.append(Unlike(tensors.named(job.key), mine, other))
    return found


def _weight(job: Job) -> int:
    patch = job.first or job.second
    assert patch is not None
    held = sum(4 * numel(tensor.shape) for _, tensor in patch.roles())
    return 3 * held + 12 * _BLOCK


def _compared(job: Job, room: Room) -> Result:
    try:
        if job.first is None or job.second is None:
            return _alone(job)
        return _both(job.key, job.first, job.second)
    except (Unsupported, ShapeMismatch) as reason:
        return reason.message


def _alone(job: Job) -> Moments:
    patch = job.first or job.second
    assert patch is not None
    own = _moments_of(patch)
    return Moments(first=own, change=own) if job.second is None else Moments(second=own, change=own)


def _moments_of(patch: Patch) -> float:
    """Squared norm of the change."""
    low = _factors(patch)
    total = (
        float(_decomposed(low).values.square().sum())
        if low is not None
        else float(patch.delta().double().square().sum())
    )
    bias = patch.bias_delta()
    return total if bias is None else total + float(bias.double().square().sum())


def _both(key: ModuleKey, first: Patch, second: Patch) -> Entry:
    name, ranks = tensors.named(key), (first.rank, second.rank)
    identical = _identical(first, second)
    biases = _biases(first, second)
    one, other = _factors(first), _factors(second)
    if one is not None and other is not None:
        left, right = _decomposed(one), _decomposed(other)
        moments = _between(one, other, left, right) + biases
        outputs, inputs = _angles(left.left, right.left), _angles(left.right, right.right)
        return Entry(name, key[0], moments, identical, outputs, inputs, ranks)
    try:
        before, after = first.delta(), second.delta()
    except Unsupported:
        return _by_tensors(key, first, second, identical)
    moments = tensors.moments(before.double().reshape(-1), after.double().reshape(-1)) + biases
    return Entry(name, key[0], moments, identical, ranks=ranks)


def _identical(first: Patch, second: Patch) -> bool:
    if (first.algorithm, first.scale) != (second.algorithm, second.scale):
        return False
    mine, other = (_named_roles(patch) for patch in (first, second))
    return mine.keys() == other.keys() and all(_same(mine[role], other[role]) for role in mine)


def _named_roles(patch: Patch) -> dict[str, Expr]:
    return {role: tensor for role, tensor in patch.roles() if role != "alpha"}


def _same(first: Expr, second: Expr) -> bool:
    return first.dtype == second.dtype and to_bytes(first) == to_bytes(second)


def _by_tensors(key: ModuleKey, first: Patch, second: Patch, identical: bool) -> Entry:
    """Changes that only the base weight could tell: tensor against tensor, where both have the same. Raises ``Unsupported``."""
    mine, other = _named_roles(first), _named_roles(second)
    like = first.algorithm == second.algorithm and {r: t.shape for r, t in mine.items()} == {
        r: t.shape for r, t in other.items()
    }
    if not like:
        raise Unsupported(f"{first.algorithm} and {second.algorithm} can only be compared with the base weight at hand")
    pieces = [(compute(mine[role]).double(), compute(other[role]).double()) for role in mine]
    entry = tensors.values(tensors.named(key), key[0], pieces)
    note = f"{first.algorithm} depends on the base weight: its tensors are compared, not its change"
    return Entry(entry.name, entry.component, entry.moments, identical, ranks=(first.rank, second.rank), note=note)


def _biases(first: Patch, second: Patch) -> Moments:
    import torch

    found = [patch.bias_delta() for patch in (first, second)]
    like = next((bias for bias in found if bias is not None), None)
    if like is None:
        return Moments()
    before, after = ((torch.zeros_like(like) if bias is None else bias).double().reshape(-1) for bias in found)
    return tensors.moments(before, after)


# low-rank changes: everything in the small spaces of the factors


@dataclass(frozen=True, slots=True)
class _Product:
    """up (m, r) and down (r, n) in fp64, the scale in up."""

    up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True)
class _Spaces:
    """Singular values of a product, and orthonormal bases (as columns) of what it writes to and reads from."""

    values: Tensor
    left: Tensor
    right: Tensor


def _factors(patch: Patch) -> _Product | None:
    """None where the change is no product, or depends on the base weight."""
    try:
        low = to_lora(patch)
    except Unsupported:
        return None
    if low.needs_base or low.residual is not None:
        return None
    return _product(low)


def _product(low: LowRank) -> _Product:
    return _Product(low.scale * compute(low.up).double().flatten(1), compute(low.down).double().flatten(1))


def _decomposed(product: _Product) -> _Spaces:
    import torch

    left, upper = torch.linalg.qr(product.up)
    right, lower = torch.linalg.qr(product.down.T)
    u, values, v = torch.linalg.svd(upper @ lower.T)
    kept = int((values > _SMALLEST * values[0]).sum())
    return _Spaces(values, left @ u[:, :kept], right @ v[:kept].T)


def _between(first: _Product, second: _Product, one: _Spaces, other: _Spaces) -> Moments:
    import torch

    up, down = torch.cat([second.up, -first.up], 1), torch.cat([second.down, first.down])
    change = torch.linalg.qr(up, mode="r").R @ torch.linalg.qr(down.T, mode="r").R.T
    inner = ((first.up.T @ second.up) * (first.down @ second.down.T)).sum()
    return Moments(
        float(one.values.square().sum()),
        float(other.values.square().sum()),
        float(inner),
        float(change.square().sum()),
        _largest(up, down),
    )


def _largest(up: Tensor, down: Tensor) -> float:
    """The largest |element| of up @ down, by blocks of rows."""
    rows = max(_BLOCK // down.shape[1], 1)
    wide, narrow = up.float(), down.float()
    return max(float((wide[at : at + rows] @ narrow).abs().max()) for at in range(0, len(wide), rows))


def _angles(first: Tensor, second: Tensor) -> Angles | None:
    """None where one of the changes is zero."""
    import torch

    if 0 in (first.shape[1], second.shape[1]):
        return None
    cosines = torch.linalg.svdvals(first.T @ second).clamp(0, 1)
    degrees = [math.degrees(math.acos(cosine)) for cosine in cosines.tolist()]
    overlap = float(cosines.square().sum()) / len(degrees)
    return Angles(min(degrees), sum(degrees) / len(degrees), max(degrees), overlap)
