"""What methods find out about whole tensors, tile by tile: inner products and order statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Tiles = Callable[[], Iterator[tuple[list[Any], Any]]]
Matrix = list[list[float]]
_LOW_BITS = 15  # of the 31 bits of a magnitude: the rest makes 65,536 classes


def changes(tensors: Sequence[Tensor], base: Tensor | None) -> list[Tensor]:
    """What every input changes; the tensors themselves where they are changes already."""
    return list(tensors) if base is None else [tensor - base for tensor in tensors]


def gram(tiles: Iterator[list[Tensor]]) -> Matrix:
    """Inner products of every two vectors, in fp64."""
    total: Matrix = []
    for vectors in tiles:
        wide = [vector.reshape(-1).double() for vector in vectors]
        total = total or [[0.0] * len(wide) for _ in wide]
        for i, first in enumerate(wide):
            for j in range(i, len(wide)):
                total[i][j] += float(first.dot(wide[j]))
                total[j][i] = total[i][j]
    return total


def largest(tiles: Tiles, ranks: Callable[[int], Sequence[int]]) -> list[list[float]]:
    """For every input the magnitudes of its changes that are the k-th largest, for each k of ``ranks(number of elements)``.

    Exact, without sorting or holding a tensor: the bits of a positive fp32 number order like the number, so one pass counts the upper
    bits and another one the lower bits of the class that holds the k-th. A rank of 0 gives infinity.
    """
    import torch

    counts = _histograms(tiles, lambda bits, _: torch.bincount(bits >> _LOW_BITS, minlength=1 << (31 - _LOW_BITS)))
    wanted = [list(ranks(int(row.sum()))) for row in counts]
    found: list[list[float]] = [[] for _ in counts]
    for place in range(len(wanted[0]) if wanted else 0):
        tops = [_class_of(row, wanted[i][place]) for i, row in enumerate(counts)]
        lows = _histograms(tiles, lambda bits, i, tops=tops: _lower(bits, tops[i][0]))  # type: ignore[misc]
        for i, (top, left) in enumerate(tops):
            low, _ = _class_of(lows[i], left)
            found[i].append(_number(top << _LOW_BITS | low) if wanted[i][place] else float("inf"))
    return found


def _histograms(tiles: Tiles, count: Callable[[Any, int], Any]) -> list[Any]:
    import torch

    total: list[Any] = []
    for tensors, base in tiles():
        bits = [change.float().abs().reshape(-1).view(torch.int32) for change in changes(tensors, base)]
        rows = [count(own, i).cpu() for i, own in enumerate(bits)]
        total = [a + b for a, b in zip(total, rows, strict=True)] if total else rows
    return total


def _lower(bits: Any, top: int) -> Any:
    import torch

    inside = bits[bits >> _LOW_BITS == top]
    return torch.bincount(inside & ((1 << _LOW_BITS) - 1), minlength=1 << _LOW_BITS)


def _class_of(counts: Any, rank: int) -> tuple[int, int]:
    """The class that holds the element of ``rank`` from above (1 is the largest), and its rank inside the class."""
    import torch

    above = torch.cumsum(counts.flip(0), 0)
    index = min(int(torch.searchsorted(above, max(rank, 1))), len(counts) - 1)
    before = int(above[index - 1]) if index else 0
    return len(counts) - 1 - index, max(rank, 1) - before


def _number(bits: int) -> float:
    import torch

    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
