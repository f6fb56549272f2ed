"""DELLA: as DARE, but large changes of a row stay more often than small ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hubtool.errors import UsageProblem
from hubtool.ops.methods._mixing import DENSITY, SCALE, added, agreed, onto
from hubtool.ops.methods._registry import Parameter, method
from hubtool.ops.methods._statistics import changes

if TYPE_CHECKING:
    from torch import Tensor

Draw = Callable[[int], "Tensor"]
_PARAMETERS = {
    "density": DENSITY,
    "epsilon": Parameter(0.1, "how much more often the largest of a row stays than the average", 0.0, 0.5),
    "scale": SCALE,
}


def _dropped(
    tensors: Sequence[Tensor], base: Tensor | None, density: float, epsilon: float, draw: Draw
) -> list[Tensor]:
    every = changes(tensors, base)
    if density == 1:
        return every
    if not 0 < density - epsilon <= density + epsilon <= 1:
        raise UsageProblem("density - epsilon must be above 0 and density + epsilon not above 1")
    kept = []
    for i, change in enumerate(every):
        chance = _chances(change, density, epsilon)
        kept.append(change * (draw(i) < chance) / chance)
    return kept


def _chances(change: Tensor, density: float, epsilon: float) -> Tensor:
    """How likely each element stays: by its rank in its row, from density - epsilon to density + epsilon."""
    import torch

    rows = change.abs().reshape(change.shape[0] if change.dim() > 1 else 1, -1)
    order = torch.argsort(rows, dim=1, stable=True)  # equal magnitudes rank by place, on any machine
    places = torch.arange(rows.shape[1], device=rows.device, dtype=torch.float32) / max(rows.shape[1] - 1, 1)
    ranks = torch.empty(rows.shape, device=rows.device).scatter_(1, order, places.expand_as(rows))
    return (ranks * (2 * epsilon) + (density - epsilon)).reshape(change.shape)


@method(
    "della", "DELLA with sign election", inputs=(1, None), base="required", random=True, tiling="rows", source="arXiv 2406.11617",
    parameters=_PARAMETERS,
)  # fmt: skip
def della(
    tensors: Sequence[Tensor], *, weights: Sequence[float], draw: Draw, density: float, epsilon: float, scale: float,
    base: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Elements stay with a probability that grows with their rank in the row, and are divided by it; then the elected sign."""
    return onto(base, agreed(_dropped(tensors, base, density, epsilon, draw), weights, mean=False), scale)


@method(
    "della_linear", "DELLA", inputs=(1, None), base="required", random=True, tiling="rows", source="arXiv 2406.11617",
    parameters=_PARAMETERS,
)  # fmt: skip
def della_linear(
    tensors: Sequence[Tensor], *, weights: Sequence[float], draw: Draw, density: float, epsilon: float, scale: float,
    base: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As ``della``, added up by strength without an election."""
    return onto(base, added(_dropped(tensors, base, density, epsilon, draw), weights), scale)
