"""Whether a parameter changed, and its change as it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hubtool.ops.extract.pairing import Pairs
from hubtool.ops.extract.pool import Room
from hubtool.ops.sides import ParameterKey
from hubtool.tensors.expr import Compute, Expr

if TYPE_CHECKING:
    from torch import Tensor


def differ(base: Expr, tuned: Expr, room: Room) -> bool:
    """Whether the numbers differ, see ``alike``. Reads up to the first difference."""
    return any(not alike(before, after) for _, _, (before, after) in room.tiles(base, tuned))


def alike(before: Tensor, after: Tensor) -> bool:
    """Equal numbers; of two dtypes, equal in the narrower one: an fp32 base beside an fp16 copy of it did not change."""
    import torch

    if before.dtype == after.dtype:
        return torch.equal(before, after)
    return torch.equal(before.to(after.dtype), after) or torch.equal(after.to(before.dtype), before)


def changed(pairs: Pairs, keys: Iterable[ParameterKey], room: Room) -> list[str]:
    """Names of the parameters that differ."""
    return [".".join(key) for key in keys if differ(*pairs.common[key], room)]


def difference(base: Expr, tuned: Expr, dtype: str) -> Expr:
    """tuned - base, subtracted in fp32 and rounded once."""
    return Compute(_subtracted, (tuned, base), base.shape, dtype)


def _subtracted(tuned: Tensor, base: Tensor) -> Tensor:
    return tuned - base


_subtracted.elementwise = True  # type: ignore[attr-defined]
_subtracted.finite = True  # type: ignore[attr-defined]
