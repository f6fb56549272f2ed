"""Cutting and joining factors: what every kind needs when an operation on the base weight reaches its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from hubtool.adapters.weight_ops import SwapHalves, TakeRows
from hubtool.errors import CorruptFile, ShapeMismatch, Unsupported
from hubtool.tensors import expr as e
from hubtool.tensors.dtypes import numel
from hubtool.tensors.expr import Expr
from hubtool.types import Shape


class Defaults:
    """What kinds without factors, magnitude or scale answer; each overrides what it knows better."""

    __slots__ = ()

    @property
    def rank(self) -> int | None:
        return None

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def dora_scale(self) -> Expr | None:
        return None

    @property
    def weight_shape(self) -> Shape | None:
        return None

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        return None, None

    @property
    def needs_base(self) -> bool:
        return False


Windows: TypeAlias = tuple[tuple[int, int], ...]  # (start, stop) pieces of an axis, in the order of the result


def windows(op: TakeRows | SwapHalves, rows: int) -> Windows:
    """The pieces of ``rows`` rows that the operation puts one after another. Raises ``Unsupported`` outside them."""
    if isinstance(op, SwapHalves):
        if rows % 2:
            raise Unsupported(f"{rows} rows have no halves to swap")
        return (rows // 2, rows), (0, rows // 2)
    return window(op.start, op.stop, rows, "rows")


def window(start: int, stop: int, length: int, what: str) -> Windows:
    """One piece, inside the axis. Sizes come from tables, tensors from strangers: both are compared here."""
    if not 0 <= start < stop <= length:
        raise Unsupported(f"{what} {start}:{stop} of a weight with {length} {what}")
    return ((start, stop),)


def coarse(pieces: Windows, step: int) -> Windows | None:
    """The same pieces counted in steps of ``step``; None where one begins or ends between two steps."""
    if any(start % step or stop % step for start, stop in pieces):
        return None
    return tuple((start // step, stop // step) for start, stop in pieces)


def pick(tensor: Expr, pieces: Windows, axis: int = 0) -> Expr:
    """The pieces of dimension 0 or 1, joined."""
    if axis == 0:
        return e.concat(tuple(e.rows(tensor, start, stop) for start, stop in pieces))
    if pieces == ((0, tensor.shape[1]),):
        return tensor
    return e.concat(tuple(e.Cols(tensor, start, stop) for start, stop in pieces), axis=1)


def pick_optional(tensor: Expr | None, pieces: Windows) -> Expr | None:
    """As ``pick`` for rows; None stays None."""
    return None if tensor is None else pick(tensor, pieces)


def transpose(tensor: Expr) -> Expr:
    """A matrix turned over; twice is the matrix again."""
    if isinstance(tensor, e.Permute) and tensor.order == (1, 0):
        return tensor.source
    return e.Permute(tensor, (1, 0))


def roles(patch: object, names: tuple[str, ...]) -> Iterator[tuple[str, Expr]]:
    """(role, tensor) of the roles a patch has; every role is an attribute of the same name."""
    for role in names:
        tensor = getattr(patch, role)
        if tensor is not None:
            yield role, tensor


def require(fits: bool, text: str) -> None:
    """Raise ``CorruptFile(text)`` unless ``fits``."""
    if not fits:
        raise CorruptFile(text)


def check_bias(name: str, rows: int, *vectors: Expr | None) -> None:
    """Changes of a bias have one number a row."""
    for vector in vectors:
        require(vector is None or numel(vector.shape) == rows, f"{name}: a bias change does not have {rows} numbers")


def check_reshape(shape: Shape, sizes: tuple[int, int]) -> None:
    """A weight may be seen under another shape while its rows stay rows. Raises ``Unsupported``."""
    if not shape or shape[0] != sizes[0] or numel(shape) != sizes[0] * sizes[1]:
        raise Unsupported(f"reshaping a weight of {sizes[0]} x {sizes[1]} to {shape}")


def fitted(change: Any, base: Any) -> Any:
    """``change`` in the shape of the base weight, where there is one. Raises ``ShapeMismatch``."""
    if base is None or tuple(base.shape) == tuple(change.shape):
        return change
    if base.shape[:1] != change.shape[:1] or base.numel() != change.numel():
        raise ShapeMismatch(f"a change of shape {tuple(change.shape)} for a weight of shape {tuple(base.shape)}")
    return change.reshape(base.shape)


def needed(base: Any, what: str) -> Any:
    """``base`` in fp32. Raises ``Unsupported`` when there is none."""
    if base is None:
        raise Unsupported(f"{what} depends on the base weight")
    return base.float()


def number(tensor: Expr) -> Any:
    """The tensor in fp32."""
    from hubtool.tensors.evaluate import compute

    return compute(tensor).float()


def matrix(tensor: Expr) -> Any:
    """The tensor in fp32 as (dimension 0, the rest)."""
    return number(tensor).flatten(1)


def bias_sum(*terms: tuple[float, Expr | None]) -> Any | None:
    """The weighted sum of the bias changes there are, one number a row; None when there is none."""
    present = [(factor, tensor) for factor, tensor in terms if tensor is not None]
    return sum(factor * number(tensor).flatten() for factor, tensor in present) if present else None


def kron(first: Any, second: Any) -> Any:
    """The Kronecker product of two matrices. ``torch.kron`` fails on transposed ones."""
    rows, columns = first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]
    return (first[:, None, :, None] * second[None, :, None, :]).reshape(rows, columns)
