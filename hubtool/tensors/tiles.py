"""Computes a tensor in tiles: never more than a few megabytes of it at a time, in buffers that are used again.

A ``Compute`` function says by attributes how its tensor may be cut:

- ``elementwise``: every output element depends on the same element of the sources (all of one shape); tiles are flat pieces.
- ``rowwise``: every output row (dimension 0) depends on the same row of the sources; tiles are whole rows, other dimensions kept.
- ``survey``: called first as ``survey(tiles, **params)``, where ``tiles()`` gives the tuples of source tiles anew at each call; what
  it returns (a norm, a threshold, inner products) is handed to the function as ``state``.
- ``positional``: the function gets ``start``, the flat index of the tile's first element.
- ``finite``: NaN or infinity in sources or result raise ``BadValues``.

The cut depends on the shape alone, so that results never depend on the number of workers.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from hubtool.errors import ShapeMismatch
from hubtool.tensors.dtypes import BITS, numel
from hubtool.tensors.evaluate import (
    Context,
    Piece,
    bad_values,
    coalesce,
    compute,
    is_bytes,
    is_finite,
    pieces,
    torch_dtype,
    widened,
)
from hubtool.tensors.expr import Compute, Expr
from hubtool.tensors.reading import Sources, pread_into

if TYPE_CHECKING:
    import torch

TILE = 1 << 18  # elements; fp32 tiles of two sources and a result stay close to a core
DEVICE_TILE = 1 << 24  # on an accelerator the transfers should be large


def tiled(expr: Expr) -> bool:
    """Whether ``expr`` can be computed tile by tile."""
    if not isinstance(expr, Compute) or not expr.sources or not expr.shape or BITS[expr.dtype] % 8:
        return False
    if any(source.shape != expr.shape for source in expr.sources) or getattr(expr.function, "raw_dtypes", False):
        return False
    return any(getattr(expr.function, name, False) for name in ("elementwise", "rowwise"))


class Bench:
    """A worker's open files and buffers, used again for every tile."""

    def __init__(self, sources: Sources, device: str = "cpu") -> None:
        self.sources = sources
        self.device = device
        self._raw: dict[int, tuple[torch.Tensor, memoryview]] = {}
        self._wide: dict[int, torch.Tensor] = {}

    @property
    def tile(self) -> int:
        """Elements of a tile."""
        return TILE if self.device == "cpu" else DEVICE_TILE

    def raw(self, slot: int, count: int) -> tuple[torch.Tensor, memoryview]:
        """``count`` bytes of host memory as a tensor and as a view for the system's calls; pinned where a device copies from it."""
        import torch

        if slot not in self._raw or len(self._raw[slot][1]) < count:
            tensor = torch.empty(count, dtype=torch.uint8, pin_memory=self.device.startswith("cuda"))
            view = memoryview((ctypes.c_char * count).from_address(tensor.data_ptr())).cast("B")
            self._raw[slot] = (tensor, view)
        tensor, view = self._raw[slot]
        return tensor[:count], view[:count]

    def wide(self, slot: int, stored: torch.Tensor) -> torch.Tensor:
        """``stored`` in fp32 on the device."""
        import torch

        held = self._wide.get(slot)
        if held is None or held.numel() < stored.numel():
            held = self._wide[slot] = torch.empty(stored.numel(), dtype=torch.float32, device=self.device)
        flat = held[: stored.numel()]
        flat.copy_(stored.to(self.device, non_blocking=True))
        return flat


class Window:
    """Random access to the bytes of a byte expression."""

    def __init__(self, expr: Expr, sources: Sources) -> None:
        self._sources = sources
        self._pieces: list[Piece] = list(coalesce(pieces(expr, sources)))
        self._ends = list(accumulate(map(len, self._pieces)))

    def read(self, view: memoryview, at: int) -> None:
        """Fill ``view`` from byte ``at`` on."""
        index = bisect_right(self._ends, at)
        while view:
            piece = self._pieces[index]
            skip = at - (self._ends[index] - len(piece))
            count = min(len(view), len(piece) - skip)
            if isinstance(piece, bytes):
                view[:count] = piece[skip : skip + count]
            else:
                pread_into(self._sources.fd(piece.path), view[:count], piece.start + skip, piece.path)
            view, at, index = view[count:], at + count, index + 1


class _Slot:
    """One source of a tiled computation."""

    def __init__(self, index: int, expr: Expr, bench: Bench) -> None:
        self._index, self._bench, self._dtype = index, bench, expr.dtype
        self._window = Window(expr, bench.sources) if is_bytes(expr) else None
        whole = None if self._window else widened(compute(expr, Context(bench.device)), expr.dtype)
        self._whole = None if whole is None else whole.reshape(-1)

    def tile(self, start: int, stop: int) -> torch.Tensor:
        """Elements ``start:stop``, widened; valid until the next call."""
        if self._whole is not None:
            return self._whole[start:stop]
        assert self._window is not None
        item = BITS[self._dtype] // 8
        raw, view = self._bench.raw(self._index, (stop - start) * item)
        self._window.read(view, start * item)
        stored = raw.view(torch_dtype(self._dtype))
        if self._dtype in ("F32", "F64") or not stored.is_floating_point():
            return stored.to(self._bench.device)
        return self._bench.wide(self._index, stored)


class _Tiler:
    """The tiles of one computation."""

    def __init__(self, expr: Compute, bench: Bench) -> None:
        self.expr, self.bench = expr, bench
        self._slots = [_Slot(index, source, bench) for index, source in enumerate(expr.sources)]
        self._rows = not getattr(expr.function, "elementwise", False)
        self._total = numel(expr.shape)
        # a vector is one row: cut, it would not know its neighbours
        row = 1 if not self._rows else numel(expr.shape[1:]) if len(expr.shape) > 1 else self._total
        self._step = max(bench.tile // max(row, 1), 1) * row

    def spans(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self._total, max(self._step, 1)):
            yield start, min(start + self._step, self._total)

    def sources(self, start: int, stop: int) -> tuple[torch.Tensor, ...]:
        return tuple(self._shaped(slot.tile(start, stop)) for slot in self._slots)

    def _shaped(self, tile: torch.Tensor) -> torch.Tensor:
        return tile.reshape(-1, *self.expr.shape[1:]) if self._rows else tile

    def all(self) -> Iterator[tuple[torch.Tensor, ...]]:
        return (self.sources(start, stop) for start, stop in self.spans())


def tiles(expr: Compute, bench: Bench) -> Iterator[tuple[int, memoryview]]:
    """The bytes of a ``tiled`` expression in pieces: offset of the first byte, bytes. A view is valid until the next one is asked for.

    Raises what evaluating raises: ``ShapeMismatch``, ``BadValues``, ``CorruptFile``.
    """
    tiler, function, params = _Tiler(expr, bench), expr.function, dict(expr.params)
    extra: dict[str, Any] = {}
    survey = getattr(function, "survey", None)
    if survey is not None:
        extra["state"] = survey(tiler.all, **params)
    item, positional = BITS[expr.dtype] // 8, getattr(function, "positional", False)
    finite = getattr(function, "finite", False)
    for start, stop in tiler.spans():
        arguments = tiler.sources(start, stop)
        if positional:
            extra["start"] = start
        result = function(*arguments, **params, **extra)
        if result.numel() != stop - start:
            raise ShapeMismatch(f"a function promised {stop - start} elements and returned {result.numel()}")
        raw, view = bench.raw(-1, (stop - start) * item)
        stored = raw.view(torch_dtype(expr.dtype))
        stored.copy_(result.reshape(-1))  # the one rounding
        if finite and not is_finite(stored):
            raise bad_values(result, expr.dtype, expr, arguments)
        yield start * item, view
