"""GLoRA: delta = scale * (b1 @ b2 + W @ a1 @ a2); it needs the base weight.

a1 (in, rank), a2 (rank, in), b1 (out, rank), b2 (rank, in[, kh, kw]), bm (rank, rank, kh, kw) for Tucker; W @ a acts on the inputs of a
convolution. Old files hold the pairs the other way round (a2 @ a1, b2 @ b1): their shapes say so. Sources: Chavan et al. 2023
(arXiv 2306.07967); LyCORIS' glora module; ComfyUI's weight_adapter for the old order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hubtool.adapters import parts
from hubtool.adapters.parts import Defaults, require
from hubtool.adapters.weight_ops import ReshapeWeight, SwapHalves, TakeCols, TakeRows, Transpose, WeightOp
from hubtool.errors import ShapeMismatch, Unsupported
from hubtool.tensors.dtypes import numel
from hubtool.tensors.expr import Expr
from hubtool.types import Shape

ROLES = ("alpha", "a1", "a2", "b1", "b2", "bm", "diff_b")


@dataclass(frozen=True, slots=True)
class GLoRA(Defaults):
    """One module's GLoRA change."""

    a1: Expr
    a2: Expr
    b1: Expr
    b2: Expr
    bm: Expr | None = None
    alpha: Expr | None = None
    alpha_value: float | None = None
    diff_b: Expr | None = None

    @property
    def algorithm(self) -> str:
        return "glora"

    @property
    def old_order(self) -> bool:
        """Whether the second tensor of each pair is the left one. Shapes that fit both ways are read the new way."""
        fits_new = _chain(self.a1, self.a2) and _left(self.b1, self.b2, self.bm)
        return not fits_new and _chain(self.a2, self.a1) and _left(self.b2, self.b1, self.bm)

    @property
    def a_pair(self) -> tuple[Expr, Expr]:
        return (self.a2, self.a1) if self.old_order else (self.a1, self.a2)

    @property
    def b_pair(self) -> tuple[Expr, Expr]:
        return (self.b2, self.b1) if self.old_order else (self.b1, self.b2)

    @property
    def rank(self) -> int:
        return self.a_pair[1].shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha_value is None else self.alpha_value / self.rank

    @property
    def sizes(self) -> tuple[int, int]:
        """(out, in * kh * kw)."""
        left, right = self.b_pair
        kernel = 1 if self.bm is None else numel(self.bm.shape[2:])
        return left.shape[0], numel(right.shape[1:]) * kernel

    @property
    def weight_shape(self) -> Shape:
        left, right = self.b_pair
        return (left.shape[0], right.shape[1], *(right if self.bm is None else self.bm).shape[2:])

    @property
    def needs_base(self) -> bool:
        return True

    def roles(self) -> Iterator[tuple[str, Expr]]:
        return parts.roles(self, ROLES)

    def check(self, name: str) -> None:
        """Raise ``CorruptFile`` when the factors cannot be multiplied. ``name`` is the module, for the message."""
        pairs = (self.a1, self.a2, self.b1, self.b2)
        require(
            all(len(t.shape) >= 2 and min(t.shape) > 0 for t in pairs), f"{name}: factors of a GLoRA are no matrices"
        )
        chained = _chain(*self.a_pair) and _left(*self.b_pair, self.bm)
        text = f"{name}: a1 {self.a1.shape}, a2 {self.a2.shape}, b1 {self.b1.shape}, b2 {self.b2.shape}"
        require(chained, f"{text} do not make a GLoRA in either order")
        up, down = self.a_pair
        require(
            up.shape[0] == numel(down.shape[1:]) and up.shape[0] in (self.sizes[1], self.weight_shape[1]),
            f"{text} do not agree on the inputs",
        )
        parts.check_bias(name, self.sizes[0], self.diff_b)

    def under(self, op: WeightOp) -> GLoRA:
        """Rows of the change are rows of b's left factor and of W; columns need all of W, whose inputs are mixed."""
        match op:
            case TakeRows() | SwapHalves():
                pieces = parts.windows(op, self.sizes[0])
                left = parts.pick(self.b_pair[0], pieces)
                side = {"b2": left} if self.old_order else {"b1": left}
                return replace(self, **side, diff_b=parts.pick_optional(self.diff_b, pieces))  # type: ignore[arg-type]
            case TakeCols():
                raise Unsupported("taking columns under a GLoRA: every column of its change needs all inputs of W")
            case Transpose():
                raise Unsupported("transposing a GLoRA: it mixes the inputs of W")
            case ReshapeWeight(shape):
                if len(shape) < 2 or shape[:2] != self.weight_shape[:2] or numel(shape[1:]) != self.sizes[1]:
                    raise Unsupported(f"reshaping a GLoRA of {self.weight_shape} to {shape}")
                return self

    def delta(self, base: Any = None) -> Any:
        """The change of ``base`` in fp32, shaped as it."""
        weight = parts.needed(base, "a GLoRA change")
        mixed = _mix(weight, *(parts.matrix(t) for t in self.a_pair))
        return self.scale * (mixed + parts.fitted(self._low_rank(), weight))

    def _low_rank(self) -> Any:
        import torch

        left, right = (parts.matrix(t) for t in self.b_pair)
        if self.bm is None:
            return (left @ right).reshape(self.weight_shape)
        return torch.einsum("mn...,im,nj->ij...", parts.number(self.bm), left, right)

    def bias_delta(self, base_bias: Any = None) -> Any | None:
        return parts.bias_sum((1.0, self.diff_b))


def _chain(left: Expr, right: Expr) -> bool:
    return len(left.shape) >= 2 and numel(left.shape[1:]) == right.shape[0] and left.shape[0] >= right.shape[0]


def _left(left: Expr, right: Expr, core: Expr | None) -> bool:
    inner = numel(left.shape[1:])
    if core is None:
        return inner == right.shape[0]
    return len(core.shape) > 2 and core.shape[:2] == (inner, right.shape[0])


def _mix(weight: Any, left: Any, right: Any) -> Any:
    """W @ left @ right over the inputs, or over inputs and kernel together where the factors span both."""
    import torch

    flat = weight.flatten(1)
    if left.shape[0] == flat.shape[1]:
        return (flat @ left @ right).reshape(weight.shape)
    if weight.ndim < 2 or left.shape[0] != weight.shape[1]:
        raise ShapeMismatch(f"a GLoRA of {left.shape[0]} inputs for a weight of shape {tuple(weight.shape)}")
    return torch.einsum("oi...,ij->oj...", weight, left @ right)


PATCH = GLoRA
