"""Kronecker: LoKr. delta = scale * kron(w1, w2), the columns of w2 running over in * kh * kw.

w1 = lokr_w1 or w1_a @ w1_b; w2 = lokr_w2 or w2_a @ w2_b, or by Tucker t2 (rank, rank, kh, kw), w2_a (rank, out_k), w2_b (rank, in_n).
scale = alpha / rank when either half is decomposed, else 1 whatever alpha says. Early files (March 2023) split a convolution's in * kh * kw
where newer ones split its inputs: ``kron(w1, w2.flatten(1)).reshape(W.shape)`` is right for both. Source: LyCORIS (arXiv 2309.14859).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hubtool.adapters import magnitude, parts
from hubtool.adapters.magnitude import Axis
from hubtool.adapters.parts import Windows, require
from hubtool.adapters.weight_ops import ReshapeWeight, SwapHalves, TakeCols, TakeRows, Transpose, WeightOp
from hubtool.errors import CorruptFile, Unsupported
from hubtool.tensors.dtypes import numel
from hubtool.tensors.expr import Expr
from hubtool.types import Shape

ROLES = (
    "alpha", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "dora_scale", "diff_b",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kronecker:
    """One module's LoKr change. ``shape``: the weight's shape where it is known (decomposed factors flatten a convolution)."""

    lokr_w1: Expr | None = None
    lokr_w1_a: Expr | None = None
    lokr_w1_b: Expr | None = None
    lokr_w2: Expr | None = None
    lokr_w2_a: Expr | None = None
    lokr_w2_b: Expr | None = None
    lokr_t2: Expr | None = None
    alpha: Expr | None = None
    alpha_value: float | None = None
    dora_scale: Expr | None = None
    diff_b: Expr | None = None
    shape: Shape | None = None

    @property
    def algorithm(self) -> str:
        return "lokr"

    @property
    def rank(self) -> int | None:
        """The rank of the decomposed half; None for full matrices."""
        inner = self.lokr_w2_b if self.lokr_w2_b is not None else self.lokr_w1_b
        return None if inner is None else inner.shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha_value is None or self.rank is None else self.alpha_value / self.rank

    @property
    def first(self) -> tuple[int, int]:
        """Rows and columns of w1."""
        a, b = (self.lokr_w1, self.lokr_w1) if self.lokr_w1 is not None else (self.lokr_w1_a, self.lokr_w1_b)
        assert a is not None
        assert b is not None
        return a.shape[0], b.shape[1]

    @property
    def second(self) -> Shape:
        """Shape of w2: two dimensions, or a kernel behind them where the factors have one."""
        if self.lokr_w2 is not None:
            return self.lokr_w2.shape
        assert self.lokr_w2_a is not None
        assert self.lokr_w2_b is not None
        if self.lokr_t2 is not None:
            return (self.lokr_w2_a.shape[1], self.lokr_w2_b.shape[1], *self.lokr_t2.shape[2:])
        return (self.lokr_w2_a.shape[0], *self.lokr_w2_b.shape[1:])

    @property
    def sizes(self) -> tuple[int, int]:
        """(out, in * kh * kw)."""
        return self.first[0] * self.second[0], self.first[1] * numel(self.second[1:])

    @property
    def weight_shape(self) -> Shape:
        if self.shape is not None:
            return self.shape
        return (self.sizes[0], self.first[1] * self.second[1], *self.second[2:])

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
        _check_half(name, self.lokr_w1, self.lokr_w1_a, self.lokr_w1_b, None)
        _check_half(name, self.lokr_w2, self.lokr_w2_a, self.lokr_w2_b, self.lokr_t2)
        w1 = self.lokr_w1 if self.lokr_w1 is not None else self.lokr_w1_b
        require(w1 is not None and len(w1.shape) == 2, f"{name}: the first half of a LoKr is a matrix")
        magnitude.check(name, self.dora_scale, self.dora_axis, *self.sizes)
        parts.check_bias(name, self.sizes[0], self.diff_b)

    def under(self, op: WeightOp) -> Kronecker:
        """The patch of ``op(W)``. Rows of W are rows of w1 times rows of w2, so cuts must fall on the borders between w1's rows."""
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

    def _rows(self, pieces: Windows) -> Kronecker:
        out = sum(stop - start for start, stop in pieces)
        return replace(
            self._cut_rows(pieces),
            dora_scale=magnitude.cut(self.dora_scale, self.dora_axis, pieces, self.sizes[0]),
            diff_b=parts.pick_optional(self.diff_b, pieces),
            shape=None if self.shape is None else (out, *self.shape[1:]),
        )

    def _cut_rows(self, pieces: Windows) -> Kronecker:
        block = self.second[0]
        borders = parts.coarse(pieces, block)
        if borders is not None:
            return replace(
                self,
                lokr_w1=parts.pick_optional(self.lokr_w1, borders),
                lokr_w1_a=parts.pick_optional(self.lokr_w1_a, borders),
            )
        row = pieces[0][0] // block
        if any(start // block != row or (stop - 1) // block != row for start, stop in pieces):
            raise Unsupported(
                f"cutting a LoKr between the borders of its blocks of {block} rows (--as lora expands it)"
            )
        inside = tuple((start - row * block, stop - row * block) for start, stop in pieces)
        a_axis = 1 if self.lokr_t2 is not None else 0
        return replace(
            self,
            lokr_w1=parts.pick_optional(self.lokr_w1, ((row, row + 1),)),
            lokr_w1_a=parts.pick_optional(self.lokr_w1_a, ((row, row + 1),)),
            lokr_w2=parts.pick_optional(self.lokr_w2, inside),
            lokr_w2_a=None if self.lokr_w2_a is None else parts.pick(self.lokr_w2_a, inside, a_axis),
        )

    def _cols(self, start: int, stop: int) -> Kronecker:
        magnitude.refuse(self.dora_scale, "taking columns")
        shape = self.weight_shape
        (piece,) = parts.window(start, stop, shape[1], "columns")
        step, block = numel(shape[2:]), numel(self.second[1:])
        borders = parts.coarse(((piece[0] * step, piece[1] * step),), block)
        if borders is None:
            raise Unsupported(f"cutting a LoKr between the borders of its blocks of {block} columns")
        return replace(
            self,
            lokr_w1=None if self.lokr_w1 is None else parts.pick(self.lokr_w1, borders, 1),
            lokr_w1_b=None if self.lokr_w1_b is None else parts.pick(self.lokr_w1_b, borders, 1),
            shape=None if self.shape is None else (shape[0], stop - start, *shape[2:]),
        )

    def _transposed(self) -> Kronecker:
        if len(self.weight_shape) != 2 or len(self.second) != 2 or self.lokr_t2 is not None:
            raise Unsupported("transposing a convolution's factors")
        if self.dora_scale is not None or self.diff_b is not None:
            raise Unsupported("transposing a module with a DoRA magnitude or a bias")
        exchanged = ("lokr_w1", "lokr_w1_b", "lokr_w1_a", "lokr_w2", "lokr_w2_b", "lokr_w2_a")
        sources = (self.lokr_w1, self.lokr_w1_a, self.lokr_w1_b, self.lokr_w2, self.lokr_w2_a, self.lokr_w2_b)
        turned = {
            role: None if tensor is None else parts.transpose(tensor)
            for role, tensor in zip(exchanged, sources, strict=True)
        }
        shape = None if self.shape is None else (self.shape[1], self.shape[0])
        return replace(self, **turned, shape=shape)  # type: ignore[arg-type]

    def delta(self, base: Any = None) -> Any:
        """The change in fp32, shaped as the base weight where one is given. With a magnitude the base is needed."""
        first = _whole(self.lokr_w1, self.lokr_w1_a, self.lokr_w1_b, None)
        second = _whole(self.lokr_w2, self.lokr_w2_a, self.lokr_w2_b, self.lokr_t2)
        change = (self.scale * parts.kron(first, second)).reshape(self.weight_shape)
        if self.dora_scale is None or self.dora_axis is None:
            return parts.fitted(change, base)
        return magnitude.change(change, base, self.dora_scale, self.dora_axis)

    def bias_delta(self, base_bias: Any = None) -> Any | None:
        return parts.bias_sum((1.0, self.diff_b))


def _check_half(name: str, whole: Expr | None, a: Expr | None, b: Expr | None, t: Expr | None) -> None:
    if whole is not None:
        fits = len(whole.shape) >= 2 and numel(whole.shape) > 0 and a is None and b is None and t is None
        require(fits, f"{name}: a LoKr half {whole.shape} is no matrix, or comes twice")
        return
    if a is None or b is None:
        raise CorruptFile(f"{name}: half of a LoKr is missing")
    fits = len(a.shape) == 2 and len(b.shape) >= 2 and min(*a.shape, *b.shape) > 0
    if t is None:
        require(fits and a.shape[1] == b.shape[0], f"{name}: LoKr factors {a.shape} and {b.shape} do not share a rank")
    else:
        fits = fits and len(b.shape) == 2 and len(t.shape) > 2 and t.shape[:2] == (a.shape[0], b.shape[0])
        require(fits, f"{name}: a LoKr core {t.shape} does not fit {a.shape} and {b.shape}")


def _whole(whole: Expr | None, a: Expr | None, b: Expr | None, t: Expr | None) -> Any:
    """A half as a matrix in fp32, its kernel flattened into the columns."""
    import torch

    if whole is not None:
        return parts.matrix(whole)
    assert a is not None
    assert b is not None
    if t is None:
        return parts.number(a) @ parts.matrix(b)
    return torch.einsum("ij...,ip,jr->pr...", parts.number(t), parts.number(a), parts.number(b)).flatten(1)


PATCH = Kronecker
