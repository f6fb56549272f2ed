"""Methods that move weights by what others learned since a base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hubtool.ops.methods._mixing import SCALE, added, onto
from hubtool.ops.methods._registry import method
from hubtool.ops.methods._statistics import changes

if TYPE_CHECKING:
    from torch import Tensor


@method(
    "task_arithmetic", "Task arithmetic", inputs=(1, None), base="required", linear=True, source="arXiv 2212.04089",
    parameters={"scale": SCALE},
)  # fmt: skip
def task_arithmetic(
    tensors: Sequence[Tensor], *, weights: Sequence[float], base: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """base + scale (w1 (A - base) + w2 (B - base) + ...)."""
    return onto(base, added(changes(tensors, base), weights), scale)


@method(
    "add_difference", "Add difference", inputs=(2, None), base="required", weights="others", linear=True,
    source="AUTOMATIC1111 checkpoint merger",
)  # fmt: skip
def add_difference(tensors: Sequence[Tensor], *, weights: Sequence[float], base: Tensor | None = None) -> Tensor:
    """A + w2 (B - base) + w3 (C - base) + ...; the first input's own strength does not count."""
    return tensors[0] + added(changes(tensors[1:], base), weights[1:])


@method(
    "subtract",
    "Subtract",
    inputs=(2, None),
    base="required",
    weights="others",
    linear=True,
    source="arXiv 2212.04089 (negation)",
)
def subtract(tensors: Sequence[Tensor], *, weights: Sequence[float], base: Tensor | None = None) -> Tensor:
    """A - w2 (B - base) - ...: takes away what the others learned; the first input's own strength does not count."""
    return tensors[0] - added(changes(tensors[1:], base), weights[1:])
