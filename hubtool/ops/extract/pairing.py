"""The parameters that two checkpoints have in common, in shapes that can be subtracted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hubtool.errors import ConversionError, ShapeMismatch
from hubtool.ops.sides import ParameterKey, Side
from hubtool.tensors import expr as e
from hubtool.tensors.expr import Expr
from hubtool.types import Shape

Pair = tuple[Expr, Expr]


@dataclass(frozen=True, slots=True)
class Pairs:
    """``common``: parameter -> (base, tuned), of one shape; ``only_base`` and ``only_tuned``: parameters of one side."""

    family: str
    common: Mapping[ParameterKey, Pair]
    only_base: tuple[ParameterKey, ...]
    only_tuned: tuple[ParameterKey, ...]

    def components(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(component for component, _ in self.common))


def pair(base: Side, tuned: Side) -> Pairs:
    """Parameters of both. Raises ``ShapeMismatch`` naming the parameter and both shapes, ``ConversionError`` where nothing is common."""
    before, after = dict(base.parameters()), dict(tuned.parameters())
    common = {key: _fitted(key, before[key], tensor, tuned) for key, tensor in after.items() if key in before}
    if not common:
        parts = " and ".join(", ".join(one.checkpoint.weights) or "nothing known" for one in (base, tuned))
        raise ConversionError(f"the checkpoints have no weight in common: they hold {parts}", path=tuned.file.path)
    return Pairs(
        base.family,
        common,
        tuple(key for key in before if key not in after),
        tuple(key for key in after if key not in before),
    )


def _fitted(key: ParameterKey, before: Expr, after: Expr, tuned: Side) -> Pair:
    """A 1x1 convolution and a linear layer are one matrix; anything else must have one shape."""
    if before.shape == after.shape:
        return before, after
    if same_matrix(before.shape, after.shape):
        return before, e.reshape(after, before.shape)
    text = f"{'.'.join(key)} is {list(before.shape)} in the base and {list(after.shape)} in the other"
    raise ShapeMismatch(text, path=tuned.file.path)


def same_matrix(first: Shape, second: Shape) -> bool:
    """Whether weights differ at most in being a linear layer here and a 1x1 convolution there."""
    return _squeezed(first) == _squeezed(second)


def _squeezed(shape: Shape) -> Shape:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
