"""Geometric median: the point whose distances to all inputs add up to the least. One odd input hardly moves it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hubtool.ops.methods._mixing import added
from hubtool.ops.methods._registry import Parameter, method
from hubtool.ops.methods._statistics import Matrix, Tiles, gram

if TYPE_CHECKING:
    from torch import Tensor

_SMALL = 1e-12  # of the largest distance: closer is the same point


def coefficients(products: Matrix, weights: Sequence[float], steps: int) -> list[float]:
    """Weiszfeld's iteration on the coefficients alone: the median is a convex combination of the inputs, and the inner products of
    their differences give every distance.
    """
    count = len(products)
    shares = _normal(weights)
    far = math.sqrt(max(0.0, *(products[i][i] for i in range(count))))
    for _ in range(steps if far else 0):
        distances = [_distance(shares, i, products) for i in range(count)]
        pulls = [weight / max(d, far * _SMALL) for weight, d in zip(weights, distances, strict=True)]
        after = _normal(pulls)
        moved = max(abs(a - b) for a, b in zip(after, shares, strict=True))
        shares = after
        if moved < 1e-9:
            break
    return shares


def _normal(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    return [weight / total for weight in weights] if total else [1 / len(weights)] * len(weights)


def _distance(shares: Sequence[float], i: int, products: Matrix) -> float:
    apart = [share - (i == j) for j, share in enumerate(shares)]
    square = sum(a * b * products[i_][j_] for i_, a in enumerate(apart) for j_, b in enumerate(apart))
    return math.sqrt(max(square, 0.0))


def survey(tiles: Tiles, *, weights: Sequence[float], steps: float, **_: Any) -> list[float]:
    """The coefficients for tensors that come in tiles. Differences to the first input, whose squares cancel nothing."""
    products = gram([tensor - tensors[0] for tensor in tensors] for tensors, _ in tiles())
    return coefficients(products, weights, int(steps))


@method(
    "geometric_median", "Geometric median", inputs=(2, None), base="none", weights="shares", survey=survey, source="Weiszfeld 1937; arXiv 1912.13445",
    parameters={"steps": Parameter(100, "iterations at most", 1, 10_000)},
)  # fmt: skip
def geometric_median(
    tensors: Sequence[Tensor], *, weights: Sequence[float], state: list[float], base: None = None, steps: float = 100
) -> Tensor:
    """The point with the least sum of (weighted) distances to the inputs, tensor by tensor."""
    return added(tensors, state)
