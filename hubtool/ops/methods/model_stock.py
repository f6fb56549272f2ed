"""Model stock: fine-tunes pulled towards their base as far as they disagree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from hubtool.ops.methods._mixing import added, onto
from hubtool.ops.methods._registry import method
from hubtool.ops.methods._statistics import Matrix, Tiles, changes, gram

if TYPE_CHECKING:
    from torch import Tensor


def coefficients(products: Matrix) -> list[float]:
    """t / n for each of n changes, t = n cos / (1 + (n - 1) cos) with the mean cosine of every two, not below 0."""
    count = len(products)
    cosines = []
    for i, j in combinations(range(count), 2):
        length = math.sqrt(products[i][i] * products[j][j])
        cosines.append(max(-1.0, min(1.0, products[i][j] / length)) if length > 0 else 0.0)
    cosine = max(sum(cosines) / len(cosines), 0.0)
    return [cosine / (1 + (count - 1) * cosine)] * count


def survey(tiles: Tiles, **_: Any) -> list[float]:
    """The coefficients for tensors that come in tiles."""
    return coefficients(gram(changes(tensors, base) for tensors, base in tiles()))


@method(
    "model_stock", "Model stock", inputs=(2, None), base="required", survey=survey, weights="none", source="arXiv 2403.19522"
)  # fmt: skip
def model_stock(
    tensors: Sequence[Tensor], *, weights: Sequence[float], state: list[float], base: Tensor | None = None
) -> Tensor:
    """t times the average of the inputs, 1 - t times the base; t from the angle between their changes."""
    return onto(base, added(changes(tensors, base), state))
