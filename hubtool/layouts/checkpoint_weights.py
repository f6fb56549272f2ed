"""What the operations of a naming do to the weights of a checkpoint. Everything is a byte range (or a strided one): nothing needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hubtool.errors import ConversionError
from hubtool.layouts.checkpoint_names import Spot
from hubtool.tensors import expr as e
from hubtool.tensors.expr import Expr, Permute, Read, Reshape
from hubtool.types import Shape

Sizes = Sequence[Sequence[Shape]]  # per published size of the model: the weight shapes of the parts, in row order


def cut(spot: Spot, tensor: Expr, sizes: Sizes, fused: Shape) -> tuple[Expr, ...]:
    """The canonical tensors that an outside tensor holds; ``fused`` is the shape of its module's weight (its own when it is the weight).

    Raises ``ConversionError`` where the shape does not allow the operation.
    """
    if spot.op == "rows":
        return _rows(spot, tensor, sizes, fused)
    return (_turned(spot, tensor),)


def join(spot: Spot, parts: Sequence[Expr]) -> Expr:
    """The outside tensor made of its canonical parts. Raises ``ConversionError`` where they do not fit together."""
    if spot.op == "rows":
        if len({(part.dtype, part.shape[1:]) for part in parts}) > 1:
            kinds = ", ".join(f"{part.dtype} {list(part.shape)}" for part in parts)
            raise ConversionError(f"{spot.key} is one tensor, its parts differ: {kinds}")
        return e.concat(tuple(parts))
    if spot.op == "conv1x1" and len(parts[0].shape) == 2:
        return e.reshape(parts[0], (*parts[0].shape, 1, 1))
    return _turned(spot, parts[0])


def _turned(spot: Spot, tensor: Expr) -> Expr:
    """Operations on one tensor; all but ``conv1x1`` are their own inverse."""
    shape = tensor.shape
    if spot.op == "swap_halves":
        return _swapped(spot, tensor)
    if spot.op == "transpose" and len(shape) == 2:
        return transposed(tensor)
    if spot.op == "conv1x1" and len(shape) > 2 and set(shape[2:]) == {1}:
        return e.reshape(tensor, shape[:2])
    return tensor


def _swapped(spot: Spot, tensor: Expr) -> Expr:
    if not tensor.shape or tensor.shape[0] % 2:
        raise ConversionError(f"{spot.key} has no two halves: shape {list(tensor.shape)}")
    half = tensor.shape[0] // 2
    return e.concat((e.rows(tensor, half, 2 * half), e.rows(tensor, 0, half)))


def transposed(tensor: Expr) -> Expr:
    """A matrix transposed by reading it with other strides: no torch for a matrix or two of a text encoder."""
    rows, columns = tensor.shape
    if not isinstance(tensor, Read):
        return Permute(tensor, (1, 0))
    first, second = tensor.ref.strides or (columns, 1)
    strides = None if (second, first) == (rows, 1) else (second, first)
    return Read(replace(tensor.ref, shape=(columns, rows), strides=strides))


def _rows(spot: Spot, tensor: Expr, sizes: Sizes, fused: Shape) -> tuple[Expr, ...]:
    if not tensor.shape:
        raise ConversionError(
            f"{spot.key} is one number for {len(spot.parts)} modules: a quantised model cannot be cut"
        )
    shape = fused if fused[:1] == tensor.shape[:1] else tensor.shape
    found, at = [], 0
    for count in _counts(spot, shape, sizes):
        found.append(e.rows(tensor, at, at + count))
        at += count
    return tuple(found)


def _counts(spot: Spot, shape: Shape, sizes: Sizes) -> list[int]:
    """Rows of each part: those of the published size that fits, else the published proportions in a model scaled otherwise.

    Without a published size the parts are equal.
    """
    published = [[part[0] for part in parts] for parts in sizes if _is(parts, shape)]
    equal = [] if sizes else [_scaled(shape, [(1,)] * len(spot.parts))]
    scaled, square = ([rule(shape, parts) for parts in sizes] for rule in (_scaled, _square))
    for found in (equal, published, scaled, square):
        known = [counts for counts in found if counts]
        if known and all(other == known[0] for other in known):
            return known[0]
    raise ConversionError(
        f"{spot.key} of shape {list(shape)} cannot be cut into {len(spot.parts)} parts: no known size of the model has it"
    )


def _is(parts: Sequence[Shape], shape: Shape) -> bool:
    """Whether the parts of a published size make up exactly this shape."""
    return sum(part[0] for part in parts) == shape[0] and (len(shape) < 2 or parts[0][1] == shape[1])


def _scaled(shape: Shape, parts: Sequence[Shape]) -> list[int]:
    """The parts' rows scaled to the fused tensor's; empty where that is not whole, or where its width is scaled otherwise."""
    total = sum(part[0] for part in parts)
    if any(part[0] * shape[0] % total for part in parts):
        return []
    if len(shape) > 1 and len(parts[0]) > 1 and shape[0] * parts[0][1] != total * shape[1]:
        return []
    return [part[0] * shape[0] // total for part in parts]


def _square(shape: Shape, parts: Sequence[Shape]) -> list[int]:
    """Parts that are square in the published size are so here, and one that is not (q, k, v, and an MLP of any ratio) takes the rest."""
    if len(shape) < 2:
        return []
    square = [part[0] == part[1] for part in parts]
    rest = shape[0] - sum(square) * shape[1]
    return [shape[1] if one else rest for one in square] if square.count(False) == 1 and rest > 0 else []


def reshaped(tensor: Expr, shape: Shape) -> Expr:
    """The same bytes under the shape an origin had (a number in a vector of one, a matrix as a 1x1 convolution)."""
    inner = tensor.source if isinstance(tensor, Reshape) else tensor
    return e.reshape(inner, shape)
