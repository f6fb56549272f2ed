"""Weighted sum and average of the inputs themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hubtool.ops.methods._mixing import added
from hubtool.ops.methods._registry import method

if TYPE_CHECKING:
    from torch import Tensor

_WHOLE = 1e-12  # shares that are this close to 1 together are one


@method(
    "weighted_sum", "Weighted sum", inputs=(1, None), base="none", weights="shares", linear=True, source="Wortsman et al. 2022 (arXiv 2203.05482)"
)  # fmt: skip
def weighted_sum(tensors: Sequence[Tensor], *, weights: Sequence[float], base: None = None) -> Tensor:
    """w1 A + w2 B + ..., strengths as given."""
    if len(tensors) == 2 and abs(sum(weights) - 1) < _WHOLE:
        import torch

        return torch.lerp(*tensors, weights[1])  # A + w2 (B - A): what both have alike stays as it is
    return added(tensors, weights)


@method(
    "n_average", "Average", inputs=(1, None), base="none", weights="none", linear=True, source="Wortsman et al. 2022 (arXiv 2203.05482)"
)  # fmt: skip
def n_average(tensors: Sequence[Tensor], *, weights: Sequence[float], base: None = None) -> Tensor:
    """(A + B + ...) / n, whatever the strengths."""
    return added(tensors, [1.0] * len(tensors)) / len(tensors)
