"""Hadamard: LoHa. delta = alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), element by element.

Plain: a (out, rank), b (rank, in * kh * kw). Tucker: t (rank, rank, kh, kw), a (rank, out), b (rank, in); each half is then
sum_ij t[i,j,...] a[i,out] b[j,in]. Source: Hyeon-Woo et al. 2021 (arXiv 2108.06098); LyCORIS (arXiv 2309.14859).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hubtool.adapters import magnitude, parts
from hubtool.adapters.magnitude import Axis
from hubtool.adapters.parts import Windows, require
from hubtool.adapters.weight_ops import ReshapeWeight, SwapHalves, TakeCols, TakeRows, Transpose, WeightOp
from hubtool.errors import Unsupported
from hubtool.tensors.dtypes import numel
from hubtool.tensors.expr import Expr
from hubtool.types import Shape

ROLES = (
    "alpha", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "dora_scale", "diff_b",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Hadamard:
    """One module's LoHa change. ``shape``: the weight's shape where it is known; plain factors show a convolution as (out, in * kh * kw)."""

    hada_w1_a: Expr
    hada_w1_b: Expr
    hada_w2_a: Expr
    hada_w2_b: Expr
    hada_t1: Expr | None = None
    hada_t2: Expr | None = None
    alpha: Expr | None = None
    alpha_value: float | None = None
    dora_scale: Expr | None = None
    diff_b: Expr | None = None
    shape: Shape | None = None

    @property
    def algorithm(self) -> str:
        return "loha"

    @property
    def rank(self) -> int:
        return self.hada_w1_b.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank; a missing alpha means alpha = rank."""
        return 1.0 if self.alpha_value is None else self.alpha_value / self.rank

    @property
    def tucker(self) -> bool:
        return self.hada_t1 is not None

    @property
    def sizes(self) -> tuple[int, int]:
        """(out, in * kh * kw)."""
        if self.hada_t1 is not None:
            return self.hada_w1_a.shape[1], self.hada_w1_b.shape[1] * numel(self.hada_t1.shape[2:])
        return self.hada_w1_a.shape[0], numel(self.hada_w1_b.shape[1:])

    @property
    def weight_shape(self) -> Shape:
        if self.shape is not None:
            return self.shape
        if self.hada_t1 is not None:
            return (self.hada_w1_a.shape[1], self.hada_w1_b.shape[1], *self.hada_t1.shape[2:])
        return self.sizes

    @property
    def dora_axis(self) -> Axis | None:
        return magnitude.axis(self.dora_scale, self.sizes[0])

    @property
    def needs_base(self) -> bool:
        return self.dora_scale is not None

    def roles(self) -> Iterator[tuple[str, Expr]]:
        return parts.roles(self, ROLES)

    def check(self, name: str) -> None:
        """Raise ``CorruptFile`` when the factors cannot be multiplied. ``name`` is the module, for the message."""
        require((self.hada_t1 is None) == (self.hada_t2 is None), f"{name}: hada_t1 and hada_t2 come together")
        halves = (self.hada_w1_a, self.hada_w1_b, self.hada_t1), (self.hada_w2_a, self.hada_w2_b, self.hada_t2)
        sizes = [_half_sizes(name, *half) for half in halves]
        require(sizes[0] == sizes[1], f"{name}: the halves of a LoHa have the shapes {sizes[0]} and {sizes[1]}")
        magnitude.check(name, self.dora_scale, self.dora_axis, *self.sizes)
        parts.check_bias(name, self.sizes[0], self.diff_b)

    def under(self, op: WeightOp) -> Hadamard:
        """The patch of ``op(W)``. Rows touch the a factors only, columns the b factors only."""
        match op:
            case TakeRows() | SwapHalves():
                return self._rows(parts.windows(op, self.sizes[0]))
            case TakeCols(start, stop):
                return self._cols(start, stop)
            case Transpose():
                return self._transposed()
            case ReshapeWeight(shape):
                parts.check_reshape(shape, self.sizes)
                return replace(self, shape=shape, dora_scale=magnitude.reshaped(self.dora_scale, self.dora_axis, shape))

    def _rows(self, pieces: Windows) -> Hadamard:
        out = sum(stop - start for start, stop in pieces)
        axis = 1 if self.tucker else 0
        return replace(
            self,
            hada_w1_a=parts.pick(self.hada_w1_a, pieces, axis),
            hada_w2_a=parts.pick(self.hada_w2_a, pieces, axis),
            dora_scale=magnitude.cut(self.dora_scale, self.dora_axis, pieces, self.sizes[0]),
            diff_b=parts.pick_optional(self.diff_b, pieces),
            shape=None if self.shape is None else (out, *self.shape[1:]),
        )

    def _cols(self, start: int, stop: int) -> Hadamard:
        magnitude.refuse(self.dora_scale, "taking columns")
        shape = self.weight_shape
        if self.tucker and shape[1] != self.hada_w1_b.shape[1]:
            raise Unsupported(f"taking columns of Tucker factors under the shape {shape}")
        (piece,) = parts.window(start, stop, shape[1], "columns")
        step = 1 if self.tucker else numel(shape[2:])
        pieces = ((piece[0] * step, piece[1] * step),)
        return replace(
            self,
            hada_w1_b=parts.pick(self.hada_w1_b, pieces, 1),
            hada_w2_b=parts.pick(self.hada_w2_b, pieces, 1),
            shape=None if self.shape is None else (shape[0], stop - start, *shape[2:]),
        )

    def _transposed(self) -> Hadamard:
        if len(self.weight_shape) != 2 or self.tucker:
            raise Unsupported("transposing a convolution's factors")
        if self.dora_scale is not None or self.diff_b is not None:
            raise Unsupported("transposing a module with a DoRA magnitude or a bias")
        turned = (parts.transpose(t) for t in (self.hada_w1_b, self.hada_w1_a, self.hada_w2_b, self.hada_w2_a))
        w1_a, w1_b, w2_a, w2_b = turned
        shape = None if self.shape is None else (self.shape[1], self.shape[0])
        return replace(self, hada_w1_a=w1_a, hada_w1_b=w1_b, hada_w2_a=w2_a, hada_w2_b=w2_b, shape=shape)

    def delta(self, base: Any = None) -> Any:
        """The change in fp32, shaped as the base weight where one is given. With a magnitude the base is needed."""
        first = _half(self.hada_w1_a, self.hada_w1_b, self.hada_t1)
        second = _half(self.hada_w2_a, self.hada_w2_b, self.hada_t2)
        change = (self.scale * first * second).reshape(self.weight_shape)
        if self.dora_scale is None or self.dora_axis is None:
            return parts.fitted(change, base)
        return magnitude.change(change, base, self.dora_scale, self.dora_axis)

    def bias_delta(self, base_bias: Any = None) -> Any | None:
        return parts.bias_sum((1.0, self.diff_b))


def _half_sizes(name: str, a: Expr, b: Expr, t: Expr | None) -> tuple[int, ...]:
    fits = len(a.shape) == 2 and len(b.shape) >= 2 and min(*a.shape, *b.shape) > 0
    if t is None:
        require(fits and a.shape[1] == b.shape[0], f"{name}: LoHa factors {a.shape} and {b.shape} do not share a rank")
        return a.shape[0], numel(b.shape[1:])
    fits = fits and len(b.shape) == 2 and len(t.shape) > 2 and t.shape[:2] == (a.shape[0], b.shape[0])
    require(fits, f"{name}: a LoHa core {t.shape} does not fit {a.shape} and {b.shape}")
    return a.shape[1], b.shape[1], *t.shape[2:]


def _half(a: Expr, b: Expr, t: Expr | None) -> Any:
    import torch

    if t is None:
        return parts.number(a) @ parts.matrix(b)
    return torch.einsum("ij...,ip,jr->pr...", parts.number(t), parts.number(a), parts.number(b))


PATCH = Hadamard
