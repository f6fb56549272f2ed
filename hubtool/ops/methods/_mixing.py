"""How pruned changes become one: added up, or by the sign that most of them agree on (TIES, arXiv 2306.01708)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hubtool.ops.methods._registry import Parameter

if TYPE_CHECKING:
    from torch import Tensor

DENSITY = Parameter(0.5, "share of each change that is kept", 0.0, 1.0)
SCALE = Parameter(1.0, "factor of the merged change")


def added(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum."""
    total = changes[0] * weights[0]
    for change, weight in zip(changes[1:], weights[1:], strict=True):
        total.add_(change, alpha=weight)
    return total


def agreed(changes: Sequence[Tensor], weights: Sequence[float], *, mean: bool) -> Tensor:
    """Of every element only the changes whose sign is that of the weighted sum (zero counts as positive), summed or averaged by weight."""
    import torch

    positive = added(changes, weights) >= 0
    total, divisor = torch.zeros_like(changes[0]), torch.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        own = change * weight
        counts = torch.where(positive, own > 0, own < 0)
        total += own * counts
        divisor += counts * weight
    return total / torch.where(divisor == 0, 1.0, divisor) if mean else total


def onto(base: Tensor | None, change: Tensor, scale: float = 1.0) -> Tensor:
    """The base with the merged change, or the change itself."""
    return change * scale if base is None else base + change * scale
