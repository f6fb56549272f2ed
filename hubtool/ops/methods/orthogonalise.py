"""Adding only what is new."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hubtool.ops.methods._mixing import added, onto
from hubtool.ops.methods._registry import method
from hubtool.ops.methods._statistics import Matrix, Tiles, changes, gram

if TYPE_CHECKING:
    from torch import Tensor


def coefficients(products: Matrix, weights: Sequence[float]) -> list[float]:
    """What each change is multiplied with: w1, w2 ... for what is left of each after those before it are projected out (Gram-Schmidt)."""
    total = [0.0] * len(products)
    done: list[list[float]] = []
    for i, weight in enumerate(weights):
        own = [float(i == j) for j in range(len(products))]
        for other in done:
            length = _product(other, other, products)
            share = _product(own, other, products) / length if length > 0 else 0.0
            own = [a - share * b for a, b in zip(own, other, strict=True)]
        done.append(own)
        total = [a + weight * b for a, b in zip(total, own, strict=True)]
    return total


def _product(a: Sequence[float], b: Sequence[float], products: Matrix) -> float:
    return sum(x * y * products[i][j] for i, x in enumerate(a) for j, y in enumerate(b))


def survey(tiles: Tiles, *, weights: Sequence[float], **_: Any) -> list[float]:
    """The coefficients for tensors that come in tiles."""
    return coefficients(gram(changes(tensors, base) for tensors, base in tiles()), weights)


@method(
    "orthogonalise", "Add what is new", inputs=(2, None), base="required", survey=survey,
    source="Gram-Schmidt; sd-mecha perpendicular_component",
)  # fmt: skip
def orthogonalise(
    tensors: Sequence[Tensor], *, weights: Sequence[float], state: list[float], base: Tensor | None = None
) -> Tensor:
    """base + w1 dA + w2 (the part of dB orthogonal to dA) + ...: what later inputs share with earlier ones is not added twice."""
    return onto(base, added(changes(tensors, base), state))
