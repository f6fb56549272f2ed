"""Frozen lazy expressions: what a tensor of the output will be, with shape and dtype known before anything is read.

``Read``, ``Literal``, ``Rows``, ``Concat`` on axis 0 and ``Reshape`` are byte ranges: ``hubtool.tensors.evaluate.chunks`` streams
them without torch or numpy. The others need torch (``evaluate.compute``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from hubtool.tensors.dtypes import nbytes, numel
from hubtool.tensors.ref import TensorRef
from hubtool.types import Shape


@dataclass(frozen=True, slots=True)
class Read:
    """The tensor as it lies in its file."""

    ref: TensorRef

    @property
    def dtype(self) -> str:
        return self.ref.dtype

    @property
    def shape(self) -> Shape:
        return self.ref.shape


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes known now: an alpha that lived in metadata, a marker tensor."""

    data: bytes
    dtype: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows ``start:stop`` of dimension 0."""

    source: Expr
    start: int
    stop: int

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def shape(self) -> Shape:
        return (self.stop - self.start, *self.source.shape[1:])


@dataclass(frozen=True, slots=True)
class Cols:
    """Columns ``start:stop`` of dimension 1."""

    source: Expr
    start: int
    stop: int

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def shape(self) -> Shape:
        return (self.source.shape[0], self.stop - self.start, *self.source.shape[2:])


@dataclass(frozen=True, slots=True)
class Concat:
    """Parts laid one after another along ``axis``; dtypes and other dimensions agree."""

    parts: tuple[Expr, ...]
    axis: int = 0

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def shape(self) -> Shape:
        first = list(self.parts[0].shape)
        first[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(first)


@dataclass(frozen=True, slots=True)
class Permute:
    """Dimensions in another order."""

    source: Expr
    order: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def shape(self) -> Shape:
        return tuple(self.source.shape[i] for i in self.order)


@dataclass(frozen=True, slots=True)
class Reshape:
    """The same elements in row-major order under another shape."""

    source: Expr
    shape: Shape

    @property
    def dtype(self) -> str:
        return self.source.dtype


@dataclass(frozen=True, slots=True)
class Cast:
    """One rounding to another dtype (values, not bytes)."""

    source: Expr
    dtype: str

    @property
    def shape(self) -> Shape:
        return self.source.shape


@dataclass(frozen=True, slots=True)
class Compute:
    """``function(*tensors, **params)`` on torch tensors in fp32 unless the function says otherwise; result cast to ``dtype``."""

    function: Callable[..., Any]
    sources: tuple[Expr, ...]
    shape: Shape
    dtype: str
    params: tuple[tuple[str, Any], ...] = field(default=())


@dataclass(frozen=True, slots=True, eq=False)
class Joint:
    """One computation with several results: ``function`` returns a tensor for each (shape, dtype) of ``outputs``, by ``Item``.

    Compared by identity: the parallel writer runs one ``Joint`` once, however many of its items are written.
    """

    function: Callable[..., Any]
    sources: tuple[Expr, ...]
    outputs: tuple[tuple[Shape, str], ...]
    params: tuple[tuple[str, Any], ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Item:
    """One result of a ``Joint``."""

    joint: Joint
    index: int

    @property
    def dtype(self) -> str:
        return self.joint.outputs[self.index][1]

    @property
    def shape(self) -> Shape:
        return self.joint.outputs[self.index][0]


Expr: TypeAlias = Read | Literal | Rows | Cols | Concat | Permute | Reshape | Cast | Compute | Item


def inner(expr: Expr) -> tuple[Expr, ...]:
    """The expressions that ``expr`` is made of directly."""
    match expr:
        case Read() | Literal():
            return ()
        case Concat(parts=parts):
            return parts
        case Compute(sources=sources):
            return sources
        case Item(joint=joint):
            return joint.sources
    return (expr.source,)


def rows(source: Expr, start: int, stop: int) -> Expr:
    """``Rows`` unless it would be the whole source; windows of windows collapse into one."""
    if start == 0 and stop == source.shape[0]:
        return source
    if isinstance(source, Rows):
        return Rows(source.source, source.start + start, source.start + stop)
    return Rows(source, start, stop)


def concat(parts: tuple[Expr, ...], axis: int = 0) -> Expr:
    """``Concat`` unless there is one part, or the parts are adjacent rows that together are their source again."""
    if len(parts) == 1:
        return parts[0]
    whole = _rejoined(parts) if axis == 0 else None
    return whole if whole is not None else Concat(parts, axis)


def _rejoined(parts: tuple[Expr, ...]) -> Expr | None:
    first = parts[0]
    if not isinstance(first, Rows):
        return None
    at = first.start
    for part in parts:
        if not (isinstance(part, Rows) and part.source == first.source and part.start == at):
            return None
        at = part.stop
    return rows(first.source, first.start, at)


def reshape(source: Expr, shape: Shape) -> Expr:
    """``Reshape`` unless the shape is already that; element counts must agree (checked, it is our own bug otherwise)."""
    if source.shape == shape:
        return source
    if numel(source.shape) != numel(shape):
        raise ValueError(f"cannot reshape {source.shape} to {shape}")
    inner = source.source if isinstance(source, Reshape) else source
    return inner if inner.shape == shape else Reshape(inner, shape)


def size(expr: Expr) -> int:
    """Bytes of the evaluated tensor."""
    return nbytes(expr.dtype, expr.shape)


def sources(expr: Expr) -> tuple[TensorRef, ...]:
    """Every tensor the expression reads, in order, with repetitions."""
    if isinstance(expr, Read):
        return (expr.ref,)
    return tuple(ref for part in inner(expr) for ref in sources(part))
