"""Breadcrumbs: neither the smallest changes nor the outliers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hubtool.ops.methods._mixing import DENSITY, SCALE, added, agreed, onto
from hubtool.ops.methods._registry import Parameter, method
from hubtool.ops.methods._statistics import Tiles, changes, largest

if TYPE_CHECKING:
    from torch import Tensor

_PARAMETERS = {
    "density": DENSITY,
    "outliers": Parameter(0.01, "share of the largest changes dropped", 0.0, 1.0),
    "scale": SCALE,
}


def _ranks(count: int, density: float, outliers: float) -> tuple[int, int]:
    """How many are kept or dropped as outliers together, and how many are outliers. Density counts first."""
    kept, top = int(density * count), int(outliers * count)
    top = min(top, count - kept)
    return min(kept + top, count), top


def survey(tiles: Tiles, *, density: float, outliers: float, **_: Any) -> list[list[float]]:
    """For every input the smallest magnitude that is kept, and that of the smallest outlier."""
    return largest(tiles, lambda count: _ranks(count, density, outliers)) if density < 1 else []


def pruned(tensors: Sequence[Tensor], base: Tensor | None, bounds: list[list[float]]) -> list[Tensor]:
    """Changes from the lower bound up to, not including, the upper one (including it where all of them are alike)."""
    every = changes(tensors, base)
    if not bounds:
        return every
    kept = []
    for change, (least, outlier) in zip(every, bounds, strict=True):
        size = change.abs()
        kept.append(change * ((size >= least) & (size < outlier if least < outlier else size <= outlier)))
    return kept


@method(
    "breadcrumbs", "Breadcrumbs", inputs=(1, None), base="required", survey=survey, source="arXiv 2312.06795",
    parameters=_PARAMETERS,
)  # fmt: skip
def breadcrumbs(
    tensors: Sequence[Tensor], *, weights: Sequence[float], state: list[list[float]], density: float, outliers: float,
    scale: float, base: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The share ``density`` of each change below its largest values (share ``outliers``), added up by strength."""
    return onto(base, added(pruned(tensors, base, state), weights), scale)


@method(
    "breadcrumbs_ties", "Breadcrumbs with sign election", inputs=(1, None), base="required", survey=survey,
    source="arXiv 2312.06795 with 2306.01708", parameters=_PARAMETERS,
)  # fmt: skip
def breadcrumbs_ties(
    tensors: Sequence[Tensor], *, weights: Sequence[float], state: list[list[float]], density: float, outliers: float,
    scale: float, base: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As ``breadcrumbs``, then only the changes with the elected sign, added up."""
    return onto(base, agreed(pruned(tensors, base, state), weights, mean=False), scale)
