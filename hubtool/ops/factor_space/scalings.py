"""IA3 beside IA3: the changes (l - 1) * W of vectors along one axis add up, and their sum is one vector again; no base is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hubtool.adapters.scaling import Scaling
from hubtool.errors import ShapeMismatch, Unsupported
from hubtool.tensors.dtypes import numel
from hubtool.tensors.expr import Compute

_HINT = "collapse the adapters into their base one after the other, then extract"


def summed(patches: Sequence[Scaling], shares: Sequence[float], dtype: str | None = None) -> Scaling:
    """W + sum share_i * (what vector i adds to W), as one vector like the first. ``dtype``: None for the first's.

    Raises ``Unsupported`` for vectors along unlike axes, or of trainers that mean different things by one, ``ShapeMismatch``.
    """
    first = patches[0]
    if len(patches) > 1:
        _check(patches)
    absolute = first.ia3 is None  # PEFT stores the factor itself, LyCORIS what it has beyond one
    vector = Compute(
        _sum,
        tuple(patch.vector for patch in patches),
        first.vector.shape,
        dtype or first.vector.dtype,
        (("shares", tuple(shares)), ("absolute", absolute)),
    )
    return replace(first, ia3_l=vector) if absolute else replace(first, ia3=vector)


def _check(patches: Sequence[Scaling]) -> None:
    if len({patch.ia3 is None for patch in patches}) > 1:
        raise Unsupported("PEFT's IA3 scales the bias as well, LyCORIS' does not: no vector does both", hint=_HINT)
    axes = {patch.axis for patch in patches}
    if None in axes:
        raise Unsupported("an IA3 vector of a convolution does not say whether it scales inputs or outputs", hint=_HINT)
    if len(axes) > 1:
        raise Unsupported("IA3 of inputs beside IA3 of outputs: no vector does both", hint=_HINT)
    lengths = sorted({numel(patch.vector.shape) for patch in patches})
    if len(lengths) > 1:
        raise ShapeMismatch(f"IA3 vectors of {lengths[0]} and of {lengths[1]} numbers")


def _sum(*vectors: Any, shares: tuple[float, ...], absolute: bool) -> Any:
    start = 1.0 if absolute else 0.0
    total = start + shares[0] * (vectors[0] - start)
    for vector, share in zip(vectors[1:], shares[1:], strict=True):
        total = total + share * (vector.reshape(total.shape) - start)
    return total


_sum.finite = True  # type: ignore[attr-defined]
