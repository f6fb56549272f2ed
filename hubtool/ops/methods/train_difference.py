"""Train difference: B's change, more where A is far from B."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hubtool.ops.methods._registry import method

if TYPE_CHECKING:
    from torch import Tensor

_GAIN = 1.8  # the original's


@method(
    "train_difference", "Train difference", inputs=(2, 2), base="required", weights="others",
    source="sd-webui-supermerger (trainDifference), sd-mecha train_difference_mask",
)  # fmt: skip
def train_difference(tensors: Sequence[Tensor], *, weights: Sequence[float], base: Tensor | None = None) -> Tensor:
    """A + 1.8 w2 m (B - base) with m = |B - A| / (|B - A| + |B - base|): nothing is added where A already has what B learned."""
    first, second = tensors
    change = second if base is None else second - base
    apart = (second - first).abs()
    total = apart + change.abs()
    mask = apart / total.masked_fill(total == 0, 1.0)
    return first + mask * change * (_GAIN * weights[1])
