"""Spherical interpolation of two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hubtool.ops.methods._mixing import added, onto
from hubtool.ops.methods._registry import method
from hubtool.ops.methods._statistics import Matrix, Tiles, changes, gram

if TYPE_CHECKING:
    from torch import Tensor

_STRAIGHT = 1e-6  # sine of an angle below which the arc is a line


def coefficients(products: Matrix, weights: Sequence[float]) -> list[float]:
    """What A and B are multiplied with, from their inner products. Also right for vectors that are never held whole (factors)."""
    total = weights[0] + weights[1]
    t = weights[1] / total if total else 0.5
    norms = [math.sqrt(max(products[i][i], 0.0)) for i in (0, 1)]
    if min(norms) == 0 or t in (0.0, 1.0):
        return [1 - t, t]
    cosine = max(-1.0, min(1.0, products[0][1] / (norms[0] * norms[1])))
    angle = math.acos(cosine)
    if math.sin(angle) < _STRAIGHT:
        return [1 - t, t]
    length = (1 - t) * norms[0] + t * norms[1]
    shares = (math.sin((1 - t) * angle), math.sin(t * angle))
    return [share / math.sin(angle) * length / norm for share, norm in zip(shares, norms, strict=True)]


def survey(tiles: Tiles, *, weights: Sequence[float], **_: Any) -> list[float]:
    """The coefficients for tensors that come in tiles."""
    return coefficients(gram(changes(tensors, base) for tensors, base in tiles()), weights)


@method(
    "slerp",
    "Spherical interpolation",
    inputs=(2, 2),
    base="optional",
    weights="shares",
    survey=survey,
    source="Shoemake 1985; sd-mecha",
)
def slerp(
    tensors: Sequence[Tensor], *, weights: Sequence[float], state: list[float], base: Tensor | None = None
) -> Tensor:
    """Along the arc from A to B, t = w2 / (w1 + w2) of the way, the length between theirs; with a base, from A - base to B - base."""
    return onto(base, added(changes(tensors, base), state))
