"""TIES: trim small changes, elect a sign, average those that agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hubtool.ops.methods._mixing import DENSITY, SCALE, agreed, onto
from hubtool.ops.methods._registry import Parameter, method
from hubtool.ops.methods._statistics import Tiles, changes, largest

if TYPE_CHECKING:
    from torch import Tensor


def survey(tiles: Tiles, *, density: float, **_: Any) -> list[list[float]]:
    """For every input the smallest magnitude that is kept: that of its (density * elements)-th largest change."""
    return largest(tiles, lambda count: (max(int(density * count), 1),)) if density < 1 else []


@method(
    "ties", "TIES", inputs=(1, None), base="required", survey=survey, source="arXiv 2306.01708",
    parameters={"density": DENSITY, "mean": Parameter(True, "average the changes that agree; false adds them"), "scale": SCALE},
)  # fmt: skip
def ties(
    tensors: Sequence[Tensor], *, weights: Sequence[float], state: list[list[float]], density: float, mean: bool, scale: float,
    base: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The largest changes of each input (share ``density``, equal magnitudes all stay), of these the ones with the elected sign."""
    kept = changes(tensors, base)
    kept = [change * (change.abs() >= least) for change, (least,) in zip(kept, state, strict=True)] if state else kept
    return onto(base, agreed(kept, weights, mean=mean), scale)
