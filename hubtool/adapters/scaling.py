"""Scaling: IA3. Rows of W (or columns, on the input) are multiplied by a learned vector; the change needs the base weight.

LyCORIS: W' = W * (1 + ia3), with a flag ``on_input``; PEFT: W' = W * ia3_l, (out, 1) for rows and (1, in) for columns of a linear layer.
PEFT's convolution vector (1, n, 1, 1) does not say which: the base weight decides, unless it is square.
Source: Liu et al. 2022 (arXiv 2205.05638).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hubtool.adapters import parts
from hubtool.adapters.magnitude import Axis
from hubtool.adapters.parts import Defaults, Windows, require
from hubtool.adapters.weight_ops import ReshapeWeight, SwapHalves, TakeCols, TakeRows, Transpose, WeightOp
from hubtool.errors import ShapeMismatch, Unsupported
from hubtool.tensors.dtypes import numel
from hubtool.tensors.expr import Expr

ROLES = ("alpha", "ia3", "on_input", "ia3_l")


@dataclass(frozen=True, slots=True)
class Scaling(Defaults):
    """One module's IA3 vector: ``ia3`` with ``on_input`` (LyCORIS) or ``ia3_l`` (PEFT)."""

    ia3: Expr | None = None
    on_input: Expr | None = None
    ia3_l: Expr | None = None
    alpha: Expr | None = None
    alpha_value: float | None = None

    @property
    def algorithm(self) -> str:
        return "ia3"

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def vector(self) -> Expr:
        tensor = self.ia3 if self.ia3 is not None else self.ia3_l
        assert tensor is not None
        return tensor

    @property
    def axis(self) -> Axis | None:
        """``out`` for rows, ``in`` for columns, None where only the base weight can tell. Reads the flag from its file."""
        if self.on_input is not None:
            from hubtool.tensors.evaluate import scalars

            return "in" if any(scalars(self.on_input)) else "out"
        shape = self.vector.shape
        if len(shape) != 2 or shape[0] == shape[1]:
            return None
        return "out" if shape[1] == 1 else "in"

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """(out, in * kh * kw), as far as one vector tells."""
        return (numel(self.vector.shape) if self.axis == "out" else None), None

    def roles(self) -> Iterator[tuple[str, Expr]]:
        return parts.roles(self, ROLES)

    def check(self, name: str) -> None:
        """Raise ``CorruptFile`` unless there is one vector, with its flag. ``name`` is the module, for the message."""
        require((self.ia3 is None) != (self.ia3_l is None), f"{name}: an IA3 module has one vector")
        require(self.ia3 is None or self.on_input is not None, f"{name}: an IA3 vector without on_input")
        require(self.on_input is None or numel(self.on_input.shape) == 1, f"{name}: on_input is one flag")
        shape = self.vector.shape
        require(bool(shape) and numel(shape) == max(shape) > 0, f"{name}: an IA3 vector of shape {shape}")

    def under(self, op: WeightOp) -> Scaling:
        """Rows concern a vector of rows only, columns one of columns."""
        along = self.axis
        if along is None:
            raise Unsupported("an IA3 vector of a convolution does not say whether it scales inputs or outputs")
        match op:
            case TakeRows() | SwapHalves():
                return self._cut(parts.windows(op, numel(self.vector.shape))) if along == "out" else self
            case TakeCols(start, stop):
                if along == "out":
                    return self
                return self._cut(parts.window(start, stop, numel(self.vector.shape), "columns"))
            case Transpose():
                raise Unsupported("transposing under an IA3 vector: the file's flag names the axis")
            case ReshapeWeight(shape):
                if len(shape) < 2 or shape[0 if along == "out" else 1] != numel(self.vector.shape):
                    raise Unsupported(f"reshaping to {shape} under an IA3 vector of {numel(self.vector.shape)}")
                return self

    def _cut(self, pieces: Windows) -> Scaling:
        shape = self.vector.shape
        cut = parts.pick(self.vector, pieces, 1 if shape[0] == 1 and len(shape) > 1 else 0)
        return replace(self, ia3=cut) if self.ia3 is not None else replace(self, ia3_l=cut)

    def delta(self, base: Any = None) -> Any:
        """The change of ``base`` in fp32, shaped as it."""
        weight = parts.needed(base, "an IA3 change")
        along = self._axis_for(weight)
        view = (-1,) + (1,) * (weight.ndim - 1) if along == "out" else (1, -1) + (1,) * (weight.ndim - 2)
        return weight * self._excess().reshape(view)

    def _excess(self) -> Any:
        """What the factor has beyond one."""
        return parts.number(self.vector).flatten() - (0 if self.ia3 is not None else 1)

    def _axis_for(self, weight: Any) -> Axis:
        count = numel(self.vector.shape)
        axes: tuple[Axis, Axis] = ("out", "in")
        fits = [one for one, length in zip(axes, weight.shape[:2], strict=False) if length == count]
        if self.axis is not None and self.axis in fits:
            return self.axis
        if self.axis is not None or not fits:
            raise ShapeMismatch(f"an IA3 vector of {count} for a weight of shape {tuple(weight.shape)}")
        if len(fits) > 1:
            raise Unsupported("an IA3 vector of a square convolution does not say whether it scales inputs or outputs")
        return fits[0]

    def bias_delta(self, base_bias: Any = None) -> Any | None:
        """PEFT scales the outputs, bias included; LyCORIS the weight alone."""
        if self.ia3_l is None or self.axis == "in":
            return None
        bias = parts.needed(base_bias, "the bias under PEFT's IA3")
        # a convolution's vector of another length scales inputs; a square one is refused by ``delta``
        return bias * self._excess() if numel(self.ia3_l.shape) == bias.numel() else None


PATCH = Scaling
