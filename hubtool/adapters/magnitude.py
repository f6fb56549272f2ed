"""DoRA's magnitude: W' = m * (W + delta) / ||W + delta||, one norm per output or one per input.

Liu et al. 2024 (arXiv 2402.09353). Per output: PEFT, LyCORIS with ``wd_on_out``. Per input: older LyCORIS, OneTrainer, A1111.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from hubtool.adapters.parts import Windows, fitted, needed, number, pick, require
from hubtool.errors import Unsupported
from hubtool.tensors import expr as e
from hubtool.tensors.dtypes import numel
from hubtool.tensors.expr import Expr
from hubtool.types import Shape

Axis: TypeAlias = Literal["out", "in"]


def axis(magnitude: Expr | None, out: int) -> Axis | None:
    """The axis by the only evidence there is, the shape: (out,) and (out, 1, ...) are per output, (1, n, ...) is per input."""
    if magnitude is None:
        return None
    shape = magnitude.shape
    return "out" if len(shape) < 2 or (shape[0] == out != 1 and numel(shape) == out) else "in"


def check(name: str, magnitude: Expr | None, along: Axis | None, out: int, inner: int) -> None:
    """Raise ``CorruptFile`` when the numbers are too few or too many. ``inner`` = inputs, times the kernel where that is unknown."""
    if magnitude is None:
        return
    count = numel(magnitude.shape)
    fits = count == out if along == "out" else count > 0 and inner % count == 0
    require(fits, f"{name}: a DoRA magnitude {magnitude.shape} does not fit a weight of {out} x {inner}")


def cut(magnitude: Expr | None, along: Axis | None, pieces: Windows, out: int) -> Expr | None:
    """The magnitude of some rows of the weight. Raises ``Unsupported`` for one per input."""
    if magnitude is None:
        return None
    if along == "in":
        raise Unsupported("taking or swapping rows under a DoRA magnitude per input: its norm spans all rows")
    ones = (1,) * (len(magnitude.shape) - 1)
    return pick(e.reshape(magnitude, (out, *ones)), pieces)


def reshaped(magnitude: Expr | None, along: Axis | None, shape: Shape) -> Expr | None:
    """The magnitude of the weight under another shape with the same rows and, for one per input, the same inputs."""
    if magnitude is None or len(magnitude.shape) < 2:
        return magnitude
    count = numel(magnitude.shape)
    if along == "in" and shape[1] != count:
        raise Unsupported(f"reshaping to {shape} under a DoRA magnitude of {count} inputs")
    tail = (1,) * (len(shape) - 2)
    return e.reshape(magnitude, (count, 1, *tail) if along == "out" else (1, count, *tail))


def refuse(magnitude: Expr | None, what: str) -> None:
    """Raise ``Unsupported`` where a magnitude is in the way of ``what``."""
    if magnitude is not None:
        raise Unsupported(f"{what} under a DoRA magnitude: its norm spans them")


def change(delta: Any, base: Any, magnitude: Expr, along: Axis) -> Any:
    """DoRA's change of the base weight: fp32, shaped as the base. A row (column) that is zero stays zero."""
    import torch

    old = needed(base, "a DoRA change")
    weight = old + fitted(delta, old)
    flat = weight.flatten(1) if along == "out" else weight.transpose(0, 1).flatten(1)
    view = ((-1, 1) if along == "out" else (1, -1)) + (1,) * (weight.ndim - 2)
    norm = flat.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny).reshape(view)
    return number(magnitude).reshape(view) * weight / norm - old
