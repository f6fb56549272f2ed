"""One rounding to another dtype, with an account of what it cost."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hubtool.errors import BadValues
from hubtool.tensors.dtypes import FLOATS
from hubtool.tensors.evaluate import torch_dtype
from hubtool.tensors.expr import Compute, Expr

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = MappingProxyType({"fp32": "F32", "bf16": "BF16", "fp16": "F16", "fp8_e4m3": "F8_E4M3", "fp8_e5m2": "F8_E5M2"})


@dataclass(frozen=True, slots=True)
class Loss:
    """Numbers of one tensor that the dtype could not hold. ``overflow``: finite ones beyond its range; ``underflow``: those that became 0;
    ``nonfinite``: NaN and infinities that were there before."""

    overflow: int = 0
    underflow: int = 0
    nonfinite: int = 0

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.overflow + other.overflow, self.underflow + other.underflow, self.nonfinite + other.nonfinite)

    def to_json(self) -> dict[str, int]:
        return {"overflow": self.overflow, "underflow": self.underflow, "nonfinite": self.nonfinite}


class Caster:
    """Casts tile by tile, on any thread, and remembers what was lost of which tensor.

    Overflow raises ``BadValues`` unless ``saturate``: then the number becomes the largest that the dtype has.
    """

    elementwise = True

    def __init__(self, dtype: str, saturate: bool) -> None:
        self.dtype = dtype
        self._saturate = saturate
        self._lost: dict[str, Loss] = {}
        self._lock = threading.Lock()

    def __call__(self, tensor: Tensor, *, name: str) -> Tensor:
        import torch

        target = torch_dtype(self.dtype)
        result = tensor.to(target)
        loss = _loss(tensor, result)
        if loss.overflow:
            if not self._saturate:
                hint = "--saturate makes them the largest number there is; bf16 has the range of fp32"
                raise BadValues(f"{name}: {loss.overflow} values are beyond the range of {self.dtype}", hint=hint)
            limit = torch.finfo(target).max
            result = torch.where(torch.isfinite(tensor), tensor.clamp(-limit, limit), tensor).to(target)
        if loss != Loss():
            with self._lock:
                self._lost[name] = self._lost.get(name, Loss()) + loss
        return result

    @property
    def lost(self) -> Mapping[str, Loss]:
        """Tensors that lost something, by name; complete when everything has been written."""
        return dict(sorted(self._lost.items()))

    def cast(self, name: str, tensor: Expr) -> Expr:
        """``tensor`` in the dtype; itself where it is that already, or holds no floating numbers, or a single one (an alpha)."""
        if tensor.dtype == self.dtype or tensor.dtype not in FLOATS or not tensor.shape or name.endswith(".alpha"):
            return tensor
        return Compute(self, (tensor,), tensor.shape, self.dtype, (("name", name),))


def _loss(tensor: Tensor, result: Tensor) -> Loss:
    """Reductions first: a tensor without losses, the usual case, is passed over three times and copied once."""
    import torch

    wide: Any = result.to(tensor.dtype)
    after, before = torch.isfinite(wide), torch.isfinite(tensor)
    lost = int(after.numel() - after.sum())
    nonfinite = int(before.numel() - before.sum()) if lost else 0
    overflow = int((before & ~after).sum()) if lost else 0
    underflow = int(torch.count_nonzero(tensor) - torch.count_nonzero(wide))
    return Loss(overflow, max(underflow, 0), nonfinite)
