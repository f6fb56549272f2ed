"""DARE: drop changes at random and enlarge the rest, so that the expected change stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hubtool.ops.methods._mixing import DENSITY, SCALE, added, agreed, onto
from hubtool.ops.methods._registry import method
from hubtool.ops.methods._statistics import changes

if TYPE_CHECKING:
    from torch import Tensor

Draw = Callable[[int], "Tensor"]


def _dropped(tensors: Sequence[Tensor], base: Tensor | None, density: float, draw: Draw) -> list[Tensor]:
    every = changes(tensors, base)
    if density in (0.0, 1.0):
        return every if density else [change * 0 for change in every]
    return [change * ((draw(i) < density) * (1 / density)) for i, change in enumerate(every)]


@method(
    "dare", "DARE", inputs=(1, None), base="required", random=True, source="arXiv 2311.03099 (dare_linear)",
    parameters={"density": DENSITY, "scale": SCALE},
)  # fmt: skip
def dare(
    tensors: Sequence[Tensor], *, weights: Sequence[float], draw: Draw, density: float, scale: float, base: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Each element of a change stays with probability ``density`` and is divided by it; the changes are added up by strength."""
    return onto(base, added(_dropped(tensors, base, density, draw), weights), scale)


@method(
    "dare_ties", "DARE with sign election", inputs=(1, None), base="required", random=True,
    source="arXiv 2311.03099 with 2306.01708", parameters={"density": DENSITY, "scale": SCALE},
)  # fmt: skip
def dare_ties(
    tensors: Sequence[Tensor], *, weights: Sequence[float], draw: Draw, density: float, scale: float, base: Tensor | None = None
) -> Tensor:  # fmt: skip
    """As ``dare``, then only the changes with the elected sign, added up."""
    return onto(base, agreed(_dropped(tensors, base, density, draw), weights, mean=False), scale)
