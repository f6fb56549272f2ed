"""Sparse: the residual that LyCORIS' extraction keeps beside low-rank factors: coordinates and values of the largest leftovers.

``bias_indices`` (2, n), ``bias_values`` (n) and ``bias_size`` (out, in * kh * kw) change the *weight*, whatever their names say;
LyCORIS writes indices as int16. Source: lycoris.utils.extract_diff.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hubtool.adapters import parts
from hubtool.adapters.parts import Defaults, require
from hubtool.adapters.weight_ops import ReshapeWeight, WeightOp
from hubtool.errors import CorruptFile, Unsupported
from hubtool.tensors.dtypes import numel
from hubtool.tensors.expr import Expr

ROLES = ("alpha", "bias_indices", "bias_values", "bias_size")
_MOST = 1 << 32  # elements of the largest weight anyone adapts, and then some


@dataclass(frozen=True, slots=True)
class Sparse(Defaults):
    """A sparse change of one weight. It is a patch of its own where it stands alone, and a part of ``LowRank`` beside factors."""

    bias_indices: Expr
    bias_values: Expr
    bias_size: Expr
    alpha: Expr | None = None
    alpha_value: float | None = None

    @property
    def algorithm(self) -> str:
        return "sparse"

    def roles(self) -> Iterator[tuple[str, Expr]]:
        return parts.roles(self, ROLES)

    def check(self, name: str) -> None:
        """Raise ``CorruptFile`` when coordinates and values do not belong together. ``name`` is the module, for the message."""
        count = numel(self.bias_values.shape)
        fits = self.bias_indices.shape == (2, count) and self.bias_size.shape == (2,)
        text = f"{self.bias_indices.shape}, {self.bias_values.shape}, {self.bias_size.shape}"
        require(fits, f"{name}: indices, values and size of a sparse residual have the shapes {text}")
        whole = all(t.dtype[0] in "IU" for t in (self.bias_indices, self.bias_size))
        require(whole, f"{name}: indices and size of a sparse residual are not whole numbers")

    def under(self, op: WeightOp) -> Sparse:
        """Only another shape of the same rows: which entries lie in a cut is known after reading them."""
        if isinstance(op, ReshapeWeight):
            return self
        raise Unsupported(f"{type(op).__name__} under a sparse residual: its coordinates would have to be read")

    def delta(self, base: Any = None) -> Any:
        """The residual as a dense fp32 tensor. Raises ``CorruptFile`` for coordinates outside the weight."""
        import torch

        from hubtool.tensors.evaluate import compute

        size = tuple(int(n) for n in compute(self.bias_size))
        at = compute(self.bias_indices).long()
        if min(size) < 1 or numel(size) > _MOST or (base is not None and numel(size) != base.numel()):
            raise CorruptFile(f"a sparse residual for a weight of {size[0]} x {size[1]}")
        if at.numel() and (int(at.min()) < 0 or bool((at >= torch.tensor(size).unsqueeze(1)).any())):
            raise CorruptFile(f"a sparse residual with coordinates outside {size[0]} x {size[1]}")
        dense = torch.zeros(size)
        dense.index_put_((at[0], at[1]), parts.number(self.bias_values).flatten(), accumulate=True)
        return parts.fitted(dense, base)

    def bias_delta(self, base_bias: Any = None) -> Any | None:
        return None


PATCH = Sparse
