"""LowRank: LoRA, LoCon and Tucker factors, with an optional DoRA magnitude and bias.

delta = alpha / rank * up @ down                     up: (out, rank[, 1, 1])   down: (rank, in[, kh, kw])
Tucker: delta[i,j,k,l] = alpha / rank * sum_mn up[i,m] mid[m,n,k,l] down[n,j]   mid: (rank, rank, kh, kw)
Sources: Hu et al. 2021 (arXiv 2106.09685); LyCORIS (arXiv 2309.14859) for Tucker; Liu et al. 2024 (arXiv 2402.09353) for DoRA.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from hubtool.adapters.weight_ops import ReshapeWeight, SwapHalves, TakeCols, TakeRows, Transpose, WeightOp
from hubtool.errors import CorruptFile, Unsupported
from hubtool.tensors import expr as e
from hubtool.tensors.dtypes import numel
from hubtool.tensors.expr import Expr
from hubtool.types import Shape

ROLES = ("alpha", "down", "mid", "up", "dora_scale", "bias", "diff_b")


@dataclass(frozen=True, slots=True)
class LowRank:
    """One module's low-rank change. ``alpha`` is the stored tensor (its dtype is data), ``alpha_value`` its value; both None: scale 1."""

    up: Expr
    down: Expr
    mid: Expr | None = None
    alpha: Expr | None = None
    alpha_value: float | None = None
    dora_scale: Expr | None = None
    bias: Expr | None = None
    diff_b: Expr | None = None
    rank_stabilised: bool = False

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank (alpha / sqrt(rank) when rank-stabilised, arXiv 2312.03732); a missing alpha means alpha = rank."""
        if self.alpha_value is None:
            return 1.0
        return self.alpha_value / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    @property
    def kernel(self) -> Shape:
        return (self.mid if self.mid is not None else self.down).shape[2:]

    @property
    def algorithm(self) -> str:
        return "locon" if numel(self.kernel) > 1 else "lora"

    @property
    def weight_shape(self) -> Shape:
        return (self.up.shape[0], self.down.shape[1], *self.kernel)

    @property
    def dora_axis(self) -> Literal["out", "in"] | None:
        """``out``: one magnitude per output (PEFT, LyCORIS now); ``in``: one per input (old LyCORIS, OneTrainer). [1, n] means inputs."""
        if self.dora_scale is None:
            return None
        shape = self.dora_scale.shape
        if len(shape) == 1 or (shape[0] == self.up.shape[0] and numel(shape) == shape[0] and shape[0] != 1):
            return "out"
        if len(shape) == 4 and shape[0] == 1 and shape[1] == self.up.shape[0] != self.down.shape[1]:
            return "out"  # PEFT's convolution magnitude: (1, out, 1, 1)
        return "in"

    def roles(self) -> Iterator[tuple[str, Expr]]:
        for role in ROLES:
            tensor = getattr(self, role)
            if tensor is not None:
                yield role, tensor

    def check(self, name: str) -> None:
        """Raise ``CorruptFile`` when the factors cannot be multiplied. ``name`` is the module, for the message."""
        up, down = self.up.shape, self.down.shape
        if len(up) not in (2, 4) or len(down) not in (2, 4):
            raise CorruptFile(f"{name}: factors must have 2 or 4 dimensions, not up {up} and down {down}")
        if up[1] != (self.mid.shape[0] if self.mid is not None else down[0]) or numel(up[2:]) != 1:
            raise CorruptFile(f"{name}: up {up} and down {down} do not share a rank")
        if len(up) != len(down) and numel(down[2:]) != 1:
            raise CorruptFile(f"{name}: a convolution's down {down} needs a 4-dimensional up, not {up}")
        if self.mid is not None and (len(self.mid.shape) != 4 or self.mid.shape[1] != down[0] or numel(down[2:]) != 1):
            raise CorruptFile(f"{name}: mid {self.mid.shape} does not fit up {up} and down {down}")

    def under(self, op: WeightOp) -> LowRank:
        """The patch of ``op(W)``. Rows touch ``up`` only, columns ``down`` only."""
        match op:
            case TakeRows(start, stop):
                return self._rows(lambda t: e.rows(t, start, stop), "taking rows")
            case SwapHalves():
                half = self.up.shape[0] // 2
                return self._rows(
                    lambda t: e.concat((e.rows(t, half, 2 * half), e.rows(t, 0, half))), "swapping halves"
                )
            case TakeCols(start, stop):
                return self._cols(start, stop)
            case Transpose():
                return self._transposed()
            case ReshapeWeight(shape):
                return self._reshaped(shape)

    def _rows(self, take: Any, what: str) -> LowRank:
        if self.dora_axis == "in":
            raise Unsupported(f"{what} under a DoRA magnitude per input: its norm spans all rows")
        return replace(
            self,
            up=take(self.up),
            dora_scale=None if self.dora_scale is None else take(self._column_magnitude()),
            bias=None if self.bias is None else take(self.bias),
            diff_b=None if self.diff_b is None else take(self.diff_b),
        )

    def _column_magnitude(self) -> Expr:
        """The per-output magnitude as (out, 1, ...), so that dimension 0 is the rows."""
        assert self.dora_scale is not None
        ones = (1,) * (len(self.weight_shape) - 1) if len(self.dora_scale.shape) > 1 else ()
        return e.reshape(self.dora_scale, (self.up.shape[0], *ones))

    def _cols(self, start: int, stop: int) -> LowRank:
        if self.dora_scale is not None:
            raise Unsupported("taking columns under a DoRA magnitude: its norm spans the columns")
        return replace(self, down=e.Cols(self.down, start, stop))

    def _transposed(self) -> LowRank:
        if len(self.weight_shape) != 2 or self.mid is not None:
            raise Unsupported("transposing a convolution's factors")
        if self.dora_scale is not None or self.bias is not None:
            raise Unsupported("transposing a module with a DoRA magnitude or a bias")
        return replace(self, up=e.Permute(self.down, (1, 0)), down=e.Permute(self.up, (1, 0)))

    def _reshaped(self, shape: Shape) -> LowRank:
        out, inside = self.weight_shape[:2]
        if shape[:2] != (out, inside) or numel(shape) != numel(self.weight_shape) or self.mid is not None:
            raise Unsupported(f"reshaping a weight {self.weight_shape} to {shape}")
        tail = (1,) * (len(shape) - 2)
        magnitude = self.dora_scale
        if magnitude is not None and len(magnitude.shape) > 1:
            magnitude = e.reshape(magnitude, (out, 1, *tail) if self.dora_axis == "out" else (1, inside, *tail))
        return replace(
            self,
            up=e.reshape(self.up, (out, self.rank, *tail)),
            down=e.reshape(self.down, (self.rank, inside, *shape[2:])),
            dora_scale=magnitude,
        )

    def delta(self, base: Any = None) -> Any:
        """scale * up @ down in fp32, shaped as the weight. With a magnitude the base weight is needed and DoRA's change is returned."""
        from hubtool.tensors.evaluate import compute

        up, down = compute(self.up).float(), compute(self.down).float()
        if self.mid is not None:
            mid = compute(self.mid).float()
            change = _tucker(up, mid, down)
        else:
            change = (up.flatten(1) @ down.flatten(1)).reshape(self.weight_shape)
        change = self.scale * change
        return change if self.dora_scale is None else self._dora_change(change, base)

    def _dora_change(self, change: Any, base: Any) -> Any:
        from hubtool.tensors.evaluate import compute

        if base is None:
            raise Unsupported("a DoRA change depends on the base weight")
        weight = base.float() + change
        out, inside = self.weight_shape[:2]
        per_output = self.dora_axis == "out"
        flat = weight.flatten(1) if per_output else weight.transpose(0, 1).flatten(1)
        view = ((out, 1) if per_output else (1, inside)) + (1,) * len(self.kernel)
        norm = flat.norm(dim=1).reshape(view)
        magnitude = compute(self.dora_scale).float().reshape(view)  # type: ignore[arg-type]
        return magnitude * weight / norm - base.float()


def _tucker(up: Any, mid: Any, down: Any) -> Any:
    import torch

    return torch.einsum("mnkl,im,nj->ijkl", mid, up.flatten(1), down.flatten(1))
