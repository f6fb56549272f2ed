"""Modules that are copied: how large their change is, and what a cast to another dtype costs of it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from hubtool.adapters.dense import Dense
from hubtool.adapters.hadamard import Hadamard
from hubtool.adapters.ir import Patch
from hubtool.adapters.kronecker import Kronecker
from hubtool.adapters.low_rank import LowRank
from hubtool.ops.factor_space import algebra
from hubtool.tensors.dtypes import FLOATS
from hubtool.tensors.expr import Cast, Expr

_WIDE = frozenset({"F32", "F64"})  # changes are computed in fp32: a cast to these rounds nothing that counts


def rounded(patch: Patch, dtype: str | None) -> bool:
    """Whether a cast to ``dtype`` changes numbers of the patch's weight."""
    return dtype is not None and dtype not in _WIDE and measurable(patch) and bool(_cast_fields(patch, dtype))


def measurable(patch: Patch) -> bool:
    """Whether the size of the change is known without the base, and without a sparse tensor's indices."""
    if patch.needs_base or (isinstance(patch, LowRank) and patch.residual is not None):
        return False
    return isinstance(patch, LowRank | Hadamard | Kronecker) or (isinstance(patch, Dense) and patch.weight is not None)


def measured(patch: Patch, dtype: str | None) -> tuple[float, float]:
    """(squared norm of the change, squared norm of what casting its tensors to ``dtype`` makes of it). Reads the factors."""
    cast = _cast(patch, dtype) if dtype is not None and rounded(patch, dtype) else None
    if isinstance(patch, LowRank) and patch.mid is None:
        return _of_factors(patch, cast if isinstance(cast, LowRank) else None)
    change = patch.delta().double()
    norm = float(change.square().sum())
    return norm, 0.0 if cast is None else float((cast.delta().double() - change).square().sum())


def _of_factors(patch: LowRank, cast: LowRank | None) -> tuple[float, float]:
    """As products of two factors; the whole change is never formed."""
    import torch

    up, down = _factors(patch)
    norm = patch.scale**2 * algebra.product_norm(up, down)
    if cast is None:
        return norm, 0.0
    new_up, new_down = _factors(cast)
    left, right = torch.cat([new_up - up, up], 1), torch.cat([new_down, new_down - down], 0)
    return norm, patch.scale**2 * algebra.product_norm(left, right)


def _factors(patch: LowRank) -> tuple[Any, Any]:
    from hubtool.tensors.evaluate import compute

    up, down = (compute(tensor).float().flatten(1) for tensor in (patch.up, patch.down))
    return up, down


def _cast(patch: Patch, dtype: str) -> Patch:
    return replace(patch, **{name: Cast(tensor, dtype) for name, tensor in _cast_fields(patch, dtype)})  # type: ignore[type-var]


def _cast_fields(patch: Patch, dtype: str) -> list[tuple[str, Expr]]:
    """By the names of the class: an embedding's roles are called otherwise than its factors."""
    found = ((one.name, getattr(patch, one.name)) for one in fields(patch))  # type: ignore[arg-type]
    tensors = ((name, value) for name, value in found if isinstance(value, Expr) and name != "alpha")
    return [(name, t) for name, t in tensors if t.shape and t.dtype in FLOATS and t.dtype != dtype]
