"""What kinds made of two halves (LoHa, LoKr) have in common: a shape told from outside, a magnitude, a bias, and how they are turned and cut."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

from hubtool.adapters import magnitude, parts
from hubtool.adapters.magnitude import Axis
from hubtool.adapters.parts import Windows, require
from hubtool.adapters.weight_ops import ReshapeWeight, SwapHalves, TakeCols, TakeRows, Transpose, WeightOp
from hubtool.errors import Unsupported
from hubtool.tensors.expr import Expr
from hubtool.types import Shape

Self = TypeVar("Self", bound="TwoHalves")


class TwoHalves(ABC):
    """A change computed from two small matrices. Subclasses are frozen dataclasses with at least the fields named here.

    ``shape``: the weight's shape where it is known; ``own_shape`` is what the factors alone say.
    """

    __slots__ = ()
    ROLES: ClassVar[tuple[str, ...]]

    dora_scale: Expr | None
    diff_b: Expr | None
    shape: Shape | None

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, int]:
        """(out, in * kh * kw)."""

    @property
    @abstractmethod
    def own_shape(self) -> Shape:
        """The weight's shape as far as the factors tell."""

    @property
    @abstractmethod
    def convolves(self) -> bool:
        """Whether the factors hold a kernel, which no transposition reaches."""

    @abstractmethod
    def check_halves(self, name: str) -> None:
        """Raise ``CorruptFile`` when a half cannot be multiplied, or the two do not fit."""

    @abstractmethod
    def row_cut(self, pieces: Windows) -> dict[str, Any]:
        """The fields that some rows of the weight change. Raises ``Unsupported``."""

    @abstractmethod
    def column_cut(self, start: int, stop: int) -> dict[str, Any]:
        """The fields that the columns ``start:stop`` (dimension 1 of the weight) change. Raises ``Unsupported``."""

    @abstractmethod
    def turned(self) -> dict[str, Any]:
        """The fields that a transposition changes."""

    @abstractmethod
    def product(self) -> Any:
        """The change without a magnitude in fp32, in any shape of as many elements."""

    @property
    def weight_shape(self) -> Shape:
        return self.own_shape if self.shape is None else self.shape

    @property
    def dora_axis(self) -> Axis | None:
        return magnitude.axis(self.dora_scale, self.sizes[0])

    @property
    def needs_base(self) -> bool:
        return self.dora_scale is not None

    def roles(self) -> Iterator[tuple[str, Expr]]:
        return parts.roles(self, self.ROLES)

    def check(self, name: str) -> None:
        """Raise ``CorruptFile`` when the factors cannot be multiplied. ``name`` is the module, for the message."""
        self.check_halves(name)
        magnitude.check(name, self.dora_scale, self.dora_axis, *self.sizes)
        parts.check_bias(name, self.sizes[0], self.diff_b)

    def under(self: Self, op: WeightOp) -> Self:
        """The patch of ``op(W)``. Raises ``Unsupported`` where the halves, a magnitude or a bias stand in the way."""
        match op:
            case TakeRows() | SwapHalves():
                return self._rows(parts.windows(op, self.sizes[0]))
            case TakeCols(start, stop):
                return self._cols(start, stop)
            case Transpose():
                return self._transposed()
            case ReshapeWeight(shape):
                parts.check_reshape(shape, self.sizes)
                return self._with(shape=shape, dora_scale=magnitude.reshaped(self.dora_scale, self.dora_axis, shape))

    def _with(self: Self, **fields: Any) -> Self:
        return replace(self, **fields)  # type: ignore[type-var]

    def _rows(self: Self, pieces: Windows) -> Self:
        out = sum(stop - start for start, stop in pieces)
        return self._with(
            **self.row_cut(pieces),
            dora_scale=magnitude.cut(self.dora_scale, self.dora_axis, pieces, self.sizes[0]),
            diff_b=parts.pick_optional(self.diff_b, pieces),
            shape=None if self.shape is None else (out, *self.shape[1:]),
        )

    def _cols(self: Self, start: int, stop: int) -> Self:
        magnitude.refuse(self.dora_scale, "taking columns")
        shape = None if self.shape is None else (self.shape[0], stop - start, *self.shape[2:])
        return self._with(**self.column_cut(start, stop), shape=shape)

    def _transposed(self: Self) -> Self:
        if len(self.weight_shape) != 2 or self.convolves:
            raise Unsupported("transposing a convolution's factors")
        if self.dora_scale is not None or self.diff_b is not None:
            raise Unsupported("transposing a module with a DoRA magnitude or a bias")
        return self._with(**self.turned(), shape=None if self.shape is None else (self.shape[1], self.shape[0]))

    def delta(self, base: Any = None) -> Any:
        """The change in fp32, shaped as the base weight where one is given. With a magnitude the base is needed."""
        change = self.product().reshape(self.weight_shape)
        if self.dora_scale is None or self.dora_axis is None:
            return parts.fitted(change, base)
        return magnitude.change(change, base, self.dora_scale, self.dora_axis)

    def bias_delta(self, base_bias: Any = None) -> Any | None:
        return parts.bias_sum((1.0, self.diff_b))


def check_pair(kind: str, name: str, a: Expr, b: Expr, core: Expr | None) -> None:
    """Raise ``CorruptFile`` unless a @ b, or the Tucker product with ``core``, is a matrix."""
    fits = len(a.shape) == 2 and len(b.shape) >= 2 and min(*a.shape, *b.shape) > 0
    if core is None:
        shared = fits and a.shape[1] == b.shape[0]
        require(shared, f"{name}: {kind} factors {a.shape} and {b.shape} do not share a rank")
        return
    fits = fits and len(b.shape) == 2 and len(core.shape) > 2 and core.shape[:2] == (a.shape[0], b.shape[0])
    require(fits, f"{name}: a {kind} core {core.shape} does not fit {a.shape} and {b.shape}")


def multiplied(a: Expr, b: Expr, core: Expr | None) -> Any:
    """a @ b in fp32, a kernel flattened into the columns; with a Tucker ``core`` (rank, rank, kh, kw) sum_ij core[i,j,...] a[i] b[j]."""
    import torch

    if core is None:
        return parts.number(a) @ parts.matrix(b)
    return torch.einsum("ij...,ip,jr->pr...", parts.number(core), parts.number(a), parts.number(b)).flatten(1)
