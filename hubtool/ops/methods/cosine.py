"""Cosine variants of the weighted sum: A keeps what it shares with B, and takes B where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hubtool.ops.methods._registry import method
from hubtool.ops.methods._statistics import Tiles

if TYPE_CHECKING:
    from torch import Tensor

_SOURCE = "sd-webui-supermerger (cosineA, cosineB), sd-mecha add_cosine_a and add_cosine_b"


def _columns(tiles: Tiles) -> Any:
    """Inner products over rows (dimension 0), for every column: A.B, A.A, B.B in fp64."""
    import torch

    total: Any = 0
    for (first, second), _ in tiles():
        a, b = first.double(), second.double()
        total = total + torch.stack([(a * b).sum(0), (a * a).sum(0), (b * b).sum(0)])
    return total


def _cosine(products: Any) -> Any:
    shared, first, second = products
    length = (first * second).sqrt()
    return (shared / length.masked_fill(length == 0, 1.0)).clamp(-1, 1)


def survey_a(tiles: Tiles, **_: Any) -> Any:
    """The cosine of every column."""
    return _cosine(_columns(tiles)).float()


def survey_b(tiles: Tiles, **_: Any) -> Any:
    """The mean of the cosine of every column and that of the whole tensors."""
    products = _columns(tiles)
    whole = _cosine(products.reshape(3, -1).sum(1))
    return ((_cosine(products) + whole) / 2).float()


def _mixed(tensors: Sequence[Tensor], weights: Sequence[float], cosine: Tensor) -> Tensor:
    """A (1 - k) + B k with k = 1 - clamp(cosine - t, 0, 1), t = w2 / (w1 + w2)."""
    total = weights[0] + weights[1]
    t = weights[1] / total if total else 0.5
    first, second = tensors
    return first + (second - first) * (1 - (cosine - t).clamp(0, 1))


@method(
    "cosine_a",
    "Cosine, columns",
    inputs=(2, 2),
    base="none",
    weights="shares",
    tiling="rows",
    survey=survey_a,
    source=_SOURCE,
)
def cosine_a(tensors: Sequence[Tensor], *, weights: Sequence[float], state: Tensor, base: None = None) -> Tensor:
    """B where the columns differ, A where they agree more than t = w2 / (w1 + w2)."""
    return _mixed(tensors, weights, state)


@method(
    "cosine_b", "Cosine, columns and whole", inputs=(2, 2), base="none", weights="shares", tiling="rows", survey=survey_b, source=_SOURCE
)  # fmt: skip
def cosine_b(tensors: Sequence[Tensor], *, weights: Sequence[float], state: Tensor, base: None = None) -> Tensor:
    """As ``cosine_a``, with the mean of the columns' cosine and that of the whole tensors."""
    return _mixed(tensors, weights, state)
