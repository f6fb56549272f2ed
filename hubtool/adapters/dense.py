"""Dense: tensors that have the weight's own shape. ``full`` and ``norm`` add, ``set`` replaces; a bias may change beside or alone.

W' = W + diff, b' = b + diff_b (LyCORIS full; w_norm, b_norm for normalisation layers); W' = set_weight (ComfyUI; BFL control adapters),
to which a strength does not apply.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hubtool.adapters import parts
from hubtool.adapters.parts import Defaults, Windows, require
from hubtool.adapters.weight_ops import ReshapeWeight, SwapHalves, TakeCols, TakeRows, Transpose, WeightOp
from hubtool.errors import Unsupported
from hubtool.tensors import expr as e
from hubtool.tensors.dtypes import numel
from hubtool.tensors.expr import Cols, Expr
from hubtool.types import Shape

ROLES = ("alpha", "diff", "w_norm", "set_weight", "diff_b", "b_norm")
WEIGHTS = ("diff", "w_norm", "set_weight")
BIASES = ("diff_b", "b_norm")


@dataclass(frozen=True, slots=True)
class Dense(Defaults):
    """One module's full change. At most one of ``diff``, ``w_norm`` and ``set_weight`` is there; an alpha is kept and means nothing."""

    diff: Expr | None = None
    w_norm: Expr | None = None
    set_weight: Expr | None = None
    diff_b: Expr | None = None
    b_norm: Expr | None = None
    alpha: Expr | None = None
    alpha_value: float | None = None

    @property
    def algorithm(self) -> str:
        if self.set_weight is not None:
            return "set"
        return "norm" if self.w_norm is not None or self.b_norm is not None else "full"

    @property
    def weight(self) -> Expr | None:
        """The tensor that concerns the weight; None where only the bias changes."""
        return next((t for t in (self.diff, self.w_norm, self.set_weight) if t is not None), None)

    @property
    def needs_base(self) -> bool:
        return self.set_weight is not None

    @property
    def weight_shape(self) -> Shape | None:
        return None if self.weight is None else self.weight.shape

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """(out, in * kh * kw); a vector has no inputs."""
        if self.weight is not None:
            return self.weight.shape[0], numel(self.weight.shape[1:]) if len(self.weight.shape) > 1 else None
        bias = self.diff_b if self.diff_b is not None else self.b_norm
        return (None if bias is None else numel(bias.shape)), None

    def roles(self) -> Iterator[tuple[str, Expr]]:
        return parts.roles(self, ROLES)

    def check(self, name: str) -> None:
        """Raise ``CorruptFile`` for a weight given twice or without dimensions, and a bias of another length. ``name`` is the module."""
        weights = [t for t in (self.diff, self.w_norm, self.set_weight) if t is not None]
        require(len(weights) < 2, f"{name}: the change of the weight comes twice")
        require(all(t.shape and t.shape[0] for t in weights), f"{name}: a change of shape {self.weight_shape}")
        require(self.diff_b is None or self.b_norm is None, f"{name}: the change of the bias comes twice")
        parts.check_bias(name, self.sizes[0] or 0, self.diff_b, self.b_norm)

    def under(self, op: WeightOp) -> Dense:
        """The same operation on the tensors themselves."""
        match op:
            case TakeRows() | SwapHalves():
                return self._rows(parts.windows(op, self.sizes[0] or 0))
            case TakeCols(start, stop):
                (piece,) = parts.window(start, stop, (self.weight_shape or (0, 0))[1], "columns")
                return self._mapped(lambda t: t if piece == (0, t.shape[1]) else Cols(t, *piece))
            case Transpose():
                if self.diff_b is not None or self.b_norm is not None or len(self.weight_shape or ()) != 2:
                    raise Unsupported("transposing what is not a single matrix")
                return self._mapped(parts.transpose)
            case ReshapeWeight(shape):
                if self.weight is not None and numel(self.weight.shape) != numel(shape):
                    raise Unsupported(f"reshaping a change {self.weight.shape} to {shape}")
                return self._mapped(lambda t: e.reshape(t, shape))

    def _rows(self, pieces: Windows) -> Dense:
        cut = {role: parts.pick_optional(getattr(self, role), pieces) for role in (*WEIGHTS, *BIASES)}
        return replace(self, **cut)  # type: ignore[arg-type]

    def _mapped(self, change: Any) -> Dense:
        mapped = {role: change(tensor) for role in WEIGHTS if (tensor := getattr(self, role)) is not None}
        return replace(self, **mapped)

    def delta(self, base: Any = None) -> Any:
        """The change in fp32. A replaced weight, and a bias alone (whose weight stays), need the base."""
        if self.set_weight is not None:
            old = parts.needed(base, "the change by a replaced weight")
            return parts.fitted(parts.number(self.set_weight), old) - old
        if self.weight is None:
            return parts.needed(base, "the weight's shape beside a changed bias") * 0
        return parts.fitted(parts.number(self.weight), base)

    def bias_delta(self, base_bias: Any = None) -> Any | None:
        return parts.bias_sum((1.0, self.diff_b), (1.0, self.b_norm))


PATCH = Dense
