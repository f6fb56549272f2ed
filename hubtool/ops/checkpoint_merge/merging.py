"""One stored tensor of the first input, merged with the same weights of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hubtool.errors import ShapeMismatch
from hubtool.layouts.checkpoint_weights import join
from hubtool.layouts.checkpoints import Home
from hubtool.ops.methods import Method
from hubtool.ops.sides import Side
from hubtool.tensors import expr as e
from hubtool.tensors.dtypes import FLOATS
from hubtool.tensors.expr import Compute, Expr
from hubtool.types import Shape

WeightsOf = Callable[[str, str], tuple[float, ...]]
_TINY = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})


@dataclass(frozen=True, slots=True)
class Merger:
    """How tensors are merged. ``others``: the inputs after ``first``; ``dtype``: of the output, None for the first input's own."""

    method: Method
    params: tuple[tuple[str, Any], ...]
    first: Side
    others: tuple[Side, ...]
    base: Side | None
    weights: WeightsOf
    dtype: str | None = None
    seed: int = 0

    def counterparts(self, home: Home, shape: Shape) -> list[Expr] | None:
        """The tensor in the other inputs and the base, in that order; None where one of them lacks it."""
        found = [side.joined(home.component, home.spot, shape) for side in self._sides()]
        every = [tensor for tensor in found if tensor is not None]
        return every if len(every) == len(found) else None

    def _sides(self) -> tuple[Side, ...]:
        return self.others if self.base is None else (*self.others, self.base)

    def lacking(self, home: Home, shape: Shape) -> list[Side]:
        """The inputs without this tensor."""
        return [side for side in self._sides() if side.joined(home.component, home.spot, shape) is None]

    def cast(self, tensor: Expr) -> Expr:
        """A tensor that is not merged, in the dtype of the output."""
        dtype = self._dtype(tensor)
        return tensor if dtype == tensor.dtype else Compute(same, (tensor,), tensor.shape, dtype)

    def _dtype(self, tensor: Expr) -> str:
        if self.dtype is None or tensor.dtype not in FLOATS or not tensor.shape:
            return tensor.dtype
        few = len(tensor.shape) < 2  # norms and biases are small, and three bits would ruin them
        return self.dtype if not (few and self.dtype in _TINY) else tensor.dtype

    def merged(self, key: str, first: Expr, rest: Sequence[Expr], home: Home) -> Expr:
        """The merged tensor as the first input stores it. Raises ``ShapeMismatch`` naming the module and both shapes."""
        paths = [part.rpartition(".")[0] for part in home.spot.parts]
        weights = [self.weights(home.component, path) for path in paths]
        if len(set(weights)) == 1:
            return self._one(f"{home.component}.{home.spot.parts[0]}", first, rest, weights[0])
        sides = (self.first, *self._sides())
        parts = [[side.tensor(home.component, part) for side in sides] for part in home.spot.parts]
        rows = zip(home.spot.parts, weights, parts, strict=True)
        made = [self._one(f"{home.component}.{part}", *_present(own), w) for part, w, own in rows]
        return join(home.spot, made)

    def _one(self, name: str, first: Expr, rest: Sequence[Expr], weights: tuple[float, ...]) -> Expr:
        if any(other.shape != first.shape for other in rest):
            return self._inpainting(name, first, rest, weights)
        inputs, base = (rest, None) if self.base is None else (rest[:-1], rest[-1])
        tensors = [first, *inputs]
        alone = self._alone(tensors, base, weights)
        if alone is not None:
            return self.cast(alone)
        tensors, weights = self._live(tensors, weights)
        return self.method.expr(
            tensors, weights=weights, dtype=self._dtype(first), base=base, params=dict(self.params), key=name, seed=self.seed
        )  # fmt: skip

    def _alone(self, tensors: Sequence[Expr], base: Expr | None, weights: tuple[float, ...]) -> Expr | None:
        """The one tensor that is the result as it is, where strengths of 0 leave no other."""
        kind = self.method.weights
        if kind == "shares" and (self.method.linear or self.method.id == "slerp") and base is None:
            live = [i for i, weight in enumerate(weights) if weight]
            return tensors[live[0]] if len(live) == 1 and weights[live[0]] == 1 else None
        if not self.method.linear:
            return None
        if kind == "others" and not any(weights[1:]):
            return tensors[0]
        return base if kind == "each" and not any(weights) else None

    def _live(self, tensors: Sequence[Expr], weights: tuple[float, ...]) -> tuple[list[Expr], tuple[float, ...]]:
        """Without inputs of strength 0, where they have no part in the result: they need not be read."""
        if not self.method.linear or self.method.inputs[1] is not None:
            return list(tensors), weights
        lead = 1 if self.method.weights == "others" else 0
        kept = [i for i, weight in enumerate(weights) if weight or i < lead]
        return [tensors[i] for i in kept], tuple(weights[i] for i in kept)

    def _inpainting(self, name: str, first: Expr, rest: Sequence[Expr], weights: tuple[float, ...]) -> Expr:
        """An inpainting model's first convolution has 5 more input channels (mask and masked picture): these stay as they are."""
        width = min(tensor.shape[1] if len(tensor.shape) == 4 else 0 for tensor in (first, *rest))
        every = [first, *rest]
        fits = name.endswith("conv_in.weight") and {tensor.shape[1] for tensor in every} <= {width, first.shape[1]}
        if (
            not fits
            or len({(tensor.shape[0], *tensor.shape[2:]) for tensor in every}) > 1
            or first.shape[1] != width + 5
        ):
            raise _mismatch(name, first, next(other for other in rest if other.shape != first.shape))
        narrow = [tensor if tensor.shape[1] == width else e.Cols(tensor, 0, width) for tensor in every]
        return e.concat(
            (self._one(name, narrow[0], narrow[1:], weights), self.cast(e.Cols(first, width, width + 5))), 1
        )


def _present(tensors: Sequence[Expr | None]) -> tuple[Expr, list[Expr]]:
    """The first input's part of a fused tensor, and those of the others; that all are there has been checked."""
    first, *rest = (tensor for tensor in tensors if tensor is not None)
    return first, rest


def _mismatch(name: str, first: Expr, other: Expr) -> ShapeMismatch:
    where = next(iter(e.sources(other)), None)
    text = f"{name} is {list(first.shape)} in the first input and {list(other.shape)} in another"
    return ShapeMismatch(text, path=where.path if where else None, hint="only models of one architecture can be merged")


def same(tensor: Any) -> Any:
    """The tensor, to be rounded by the engine."""
    return tensor


same.elementwise = True  # type: ignore[attr-defined]
same.finite = True  # type: ignore[attr-defined]
