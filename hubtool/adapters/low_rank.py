"""LowRank: LoRA, LoCon and Tucker factors, with an optional DoRA magnitude, bias and sparse residual.

delta = alpha / rank * up @ down                     up: (out, rank[, 1, 1])   down: (rank, in[, kh, kw])
Tucker: delta[i,j,k,l] = alpha / rank * sum_mn up[i,m] mid[m,n,k,l] down[n,j]   mid: (rank, rank, kh, kw)
Sources: Hu et al. 2021 (arXiv 2106.09685); LyCORIS (arXiv 2309.14859) for Tucker; Liu et al. 2024 (arXiv 2402.09353) for DoRA.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hubtool.adapters import magnitude, parts
from hubtool.adapters.magnitude import Axis
from hubtool.adapters.parts import Windows
from hubtool.adapters.sparse import Sparse
from hubtool.adapters.weight_ops import ReshapeWeight, SwapHalves, TakeCols, TakeRows, Transpose, WeightOp
from hubtool.errors import CorruptFile, Unsupported
from hubtool.tensors import expr as e
from hubtool.tensors.dtypes import numel
from hubtool.tensors.expr import Expr
from hubtool.types import Shape

ROLES = (
    "alpha", "down", "mid", "up", "dora_scale", "bias", "diff_b", "bias_indices", "bias_values", "bias_size",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LowRank:
    """One module's low-rank change. ``alpha`` is the stored tensor (its dtype is data), ``alpha_value`` its value; both None: scale 1.

    ``embedding``: the factors are stored turned over, as PEFT keeps those of an embedding (``embedding_A``, ``embedding_B``).
    """

    up: Expr
    down: Expr
    mid: Expr | None = None
    alpha: Expr | None = None
    alpha_value: float | None = None
    dora_scale: Expr | None = None
    bias: Expr | None = None
    diff_b: Expr | None = None
    rank_stabilised: bool = False
    bias_indices: Expr | None = None
    bias_values: Expr | None = None
    bias_size: Expr | None = None
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank (alpha / sqrt(rank) when rank-stabilised, arXiv 2312.03732); a missing alpha means alpha = rank."""
        if self.alpha_value is None or not self.rank:
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
    def sizes(self) -> tuple[int, int]:
        """(out, in * kh * kw)."""
        return self.up.shape[0], numel(self.weight_shape[1:])

    @property
    def needs_base(self) -> bool:
        return self.dora_scale is not None

    @property
    def residual(self) -> Sparse | None:
        """The sparse part of the change, where an extraction kept one."""
        if self.bias_indices is None or self.bias_values is None or self.bias_size is None:
            return None
        return Sparse(self.bias_indices, self.bias_values, self.bias_size)

    @property
    def dora_axis(self) -> Axis | None:
        """``out``: one magnitude per output (PEFT, LyCORIS now); ``in``: one per input (old LyCORIS, OneTrainer). [1, n] means inputs."""
        shape = () if self.dora_scale is None else self.dora_scale.shape
        if len(shape) == 4 and shape[0] == 1 and shape[1] == self.up.shape[0] != self.down.shape[1]:
            return "out"  # PEFT's convolution magnitude: (1, out, 1, 1)
        return magnitude.axis(self.dora_scale, self.up.shape[0])

    def roles(self) -> Iterator[tuple[str, Expr]]:
        for role, tensor in parts.roles(self, ROLES):
            if self.embedding and role in ("up", "down"):
                yield ("embedding_A" if role == "up" else "embedding_B"), parts.transpose(tensor)
            else:
                yield role, tensor

    def check(self, name: str) -> None:
        """Raise ``CorruptFile`` when the factors cannot be multiplied. ``name`` is the module, for the message."""
        up, down = self.up.shape, self.down.shape
        if len(up) < 2 or len(down) < 2 or max(len(up), len(down)) > 5:
            raise CorruptFile(f"{name}: factors must have 2 or 4 dimensions, not up {up} and down {down}")
        if 0 in (*up, *down):
            raise CorruptFile(f"{name}: factors without numbers, up {up} and down {down}")
        if up[1] != (self.mid.shape[0] if self.mid is not None and self.mid.shape else down[0]) or numel(up[2:]) != 1:
            raise CorruptFile(f"{name}: up {up} and down {down} do not share a rank")
        if len(up) != len(down) and numel(down[2:]) != 1:
            raise CorruptFile(f"{name}: a convolution's down {down} needs a 4-dimensional up, not {up}")
        if self.mid is not None and (len(self.mid.shape) < 3 or self.mid.shape[1] != down[0] or numel(down[2:]) != 1):
            raise CorruptFile(f"{name}: mid {self.mid.shape} does not fit up {up} and down {down}")
        self._check_company(name)

    def _check_company(self, name: str) -> None:
        magnitude.check(name, self.dora_scale, self.dora_axis, self.up.shape[0], self.down.shape[1])
        parts.check_bias(name, self.up.shape[0], self.bias, self.diff_b)
        present = [t is not None for t in (self.bias_indices, self.bias_values, self.bias_size)]
        parts.require(any(present) == all(present), f"{name}: part of a sparse residual is missing")
        if self.residual is not None:
            self.residual.check(name)

    def under(self, op: WeightOp) -> LowRank:
        """The patch of ``op(W)``. Rows touch ``up`` only, columns ``down`` only."""
        if self.residual is not None:
            self.residual.under(op)
        match op:
            case TakeRows() | SwapHalves():
                return self._rows(parts.windows(op, self.up.shape[0]))
            case TakeCols(start, stop):
                return self._cols(start, stop)
            case Transpose():
                return self._transposed()
            case ReshapeWeight(shape):
                return self._reshaped(shape)

    def _rows(self, pieces: Windows) -> LowRank:
        return replace(
            self,
            up=parts.pick(self.up, pieces),
            dora_scale=magnitude.cut(self.dora_scale, self.dora_axis, pieces, self.up.shape[0]),
            bias=parts.pick_optional(self.bias, pieces),
            diff_b=parts.pick_optional(self.diff_b, pieces),
        )

    def _cols(self, start: int, stop: int) -> LowRank:
        magnitude.refuse(self.dora_scale, "taking columns")
        pieces = parts.window(start, stop, self.down.shape[1], "columns")
        return replace(self, down=parts.pick(self.down, pieces, 1))

    def _transposed(self) -> LowRank:
        if len(self.weight_shape) != 2 or self.mid is not None:
            raise Unsupported("transposing a convolution's factors")
        if self.dora_scale is not None or self.bias is not None or self.diff_b is not None:
            raise Unsupported("transposing a module with a DoRA magnitude or a bias")
        return replace(self, up=parts.transpose(self.down), down=parts.transpose(self.up))

    def _reshaped(self, shape: Shape) -> LowRank:
        out, inside = self.weight_shape[:2]
        if shape[:2] != (out, inside) or numel(shape) != numel(self.weight_shape) or self.mid is not None:
            raise Unsupported(f"reshaping a weight {self.weight_shape} to {shape}")
        return replace(
            self,
            up=e.reshape(self.up, (out, self.rank, *(1,) * (len(shape) - 2))),
            down=e.reshape(self.down, (self.rank, inside, *shape[2:])),
            dora_scale=magnitude.reshaped(self.dora_scale, self.dora_axis, shape),
        )

    def delta(self, base: Any = None) -> Any:
        """scale * up @ down in fp32, shaped as the base weight where one is given. With a magnitude the base is needed."""
        up, down = parts.number(self.up), parts.number(self.down)
        if self.mid is not None:
            change = _tucker(up, parts.number(self.mid), down)
        else:
            change = (up.flatten(1) @ down.flatten(1)).reshape(self.weight_shape)
        if self.residual is not None:
            change = change + self.residual.delta(change)
        change = self.scale * change
        if self.dora_scale is None or self.dora_axis is None:
            return parts.fitted(change, base)
        return magnitude.change(change, base, self.dora_scale, self.dora_axis)

    def bias_delta(self, base_bias: Any = None) -> Any | None:
        """``bias`` is the up layer's, so it is scaled with it; ``diff_b`` is not."""
        return parts.bias_sum((self.scale, self.bias), (1.0, self.diff_b))


def _tucker(up: Any, mid: Any, down: Any) -> Any:
    import torch

    return torch.einsum("mn...,im,nj->ij...", mid, up.flatten(1), down.flatten(1))


PATCH = LowRank
