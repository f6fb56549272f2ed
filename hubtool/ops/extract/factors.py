"""Decomposes the change of one module after another; what is measured of each becomes its ``Spectrum``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hubtool.errors import BadValues
from hubtool.ops import randomised_svd as svd
from hubtool.ops.extract import pool
from hubtool.ops.extract.changes import alike
from hubtool.ops.extract.pool import Progress, Room
from hubtool.ops.extract.request import DTYPES, Request
from hubtool.ops.extract.scratch import Scratch
from hubtool.ops.extract.spectrum import Spectrum
from hubtool.ops.extract.units import Unit
from hubtool.tensors.dtypes import numel
from hubtool.tensors.evaluate import torch_dtype
from hubtool.tensors.expr import Expr
from hubtool.tensors.expr import sources as reads

if TYPE_CHECKING:
    from torch import Tensor

_SMALL = 1e-3  # of the energy: a smaller squared error is measured, not computed as a difference of large numbers
_BLOCKS = 8  # blocks of directions that a decomposition keeps, for the estimate of memory


@dataclass(frozen=True, slots=True)
class Decomposed:
    """``up`` (out, r) and ``down`` (r, in * kh * kw) on the scratch, in the output's dtype, with alpha = r."""

    unit: Unit
    spectrum: Spectrum
    up: Expr
    down: Expr


def decompose(
    units: Sequence[Unit], request: Request, scratch: Scratch, progress: Progress | None = None
) -> list[Decomposed | None]:
    """Every unit's factors, None for one that did not change. Raises ``BadValues`` naming a tensor with NaN or infinity."""

    def work(unit: Unit, room: Room) -> Decomposed | None:
        return _decompose(unit, request, scratch, room)

    return pool.run(
        units,
        work,
        lambda unit: memory(unit, request),
        device=request.device,
        workers=request.workers,
        progress=progress,
    )


def memory(unit: Unit, request: Request) -> int:
    """fp32 and bf16 copies of the change, and the bases."""
    return 6 * numel(unit.shape) + 4 * sum(unit.sizes) * request.most(unit.convolution) * _BLOCKS


def _decompose(unit: Unit, request: Request, scratch: Scratch, room: Room) -> Decomposed | None:
    matrix = difference(unit.base, unit.tuned, room)
    if matrix is None:
        return None
    matrix = matrix.reshape(unit.sizes)
    rank = request.most(unit.convolution)
    energy = svd.energy_of(matrix)
    if not math.isfinite(energy):
        raise _not_finite(unit)
    halves = room.halves(matrix.numel()) if matrix.numel() in svd.HALVES else None
    seed = svd.seed_of(request.seed, unit.name)
    found = svd.truncated_svd(matrix, rank, seed=seed, energy=energy, halves=halves)
    name, stored = unit.name, DTYPES[request.dtype]
    up, down = (factor.to(torch_dtype(stored)) for factor in svd.balanced(found))
    return Decomposed(
        unit,
        _spectrum(matrix, found, up, down),
        scratch.add(f"{name}.up", up, stored, tuple(up.shape)),
        scratch.add(f"{name}.down", down, stored, tuple(down.shape)),
    )


def _spectrum(matrix: Tensor, found: svd.Factors, up: Tensor, down: Tensor) -> Spectrum:
    """What was found, with the error of the very numbers that will be written. Spoils ``matrix``."""
    values = found.values.double().tolist()
    noise = _noise(found, up, down)
    rest = found.rest
    if rest < _SMALL * found.energy:
        matrix.addmm_(up.to(matrix), down.to(matrix), alpha=-1)
        rest = max(svd.energy_of(matrix) - sum(noise), 0.0)
    return Spectrum(tuple(values), found.energy, rest, tuple(noise), found.bound, found.products)


def _noise(found: svd.Factors, up: Tensor, down: Tensor) -> list[float]:
    """||u d - u' d'||^2 of every rank, u' and d' being the rounded factors. Roundings of different ranks hardly have a common direction."""
    exact_up, exact_down = svd.balanced(found)
    wide_up, wide_down = up.to(exact_up), down.to(exact_down)
    left, right = wide_up - exact_up, wide_down - exact_down
    first = left.square().sum(0) * exact_down.square().sum(1)
    second = wide_up.square().sum(0) * right.square().sum(1)
    cross = (left * wide_up).sum(0) * (exact_down * right).sum(1)
    values: list[float] = (first + second + 2 * cross).double().clamp_min(0).tolist()
    return values


def difference(base: Expr, tuned: Expr, room: Room) -> Tensor | None:
    """tuned - base as flat fp32 in the room's buffer; None where nothing changed (see ``changes.alike``)."""
    change = room.buffer(numel(base.shape))
    same = True
    for start, stop, (before, after) in room.tiles(base, tuned):
        piece = change[start:stop]
        if same:
            same = alike(before, after)
        _subtract(piece, before, after)
    return None if same else change


def _subtract(piece: Tensor, before: Tensor, after: Tensor) -> None:
    if before.element_size() == 8 or after.element_size() == 8:
        piece.copy_(after.double() - before.double())
        return
    piece.copy_(after)
    piece.sub_(before.to(piece))


def _not_finite(unit: Unit) -> BadValues:
    from hubtool.tensors.values import scan_values

    for ref in (*reads(unit.base), *reads(unit.tuned)):
        if scan_values(ref).nonfinite_at is not None:
            return BadValues(f"{ref.name} holds NaN or infinity", path=ref.path)
    return BadValues(f"the change of {unit.name} overflows fp32")
