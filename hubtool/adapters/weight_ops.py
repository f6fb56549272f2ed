"""Operations on a *base weight* (out, in[, kh, kw]). Naming tables speak only of these; each adapter kind answers with ``under(op)``.

Nothing here touches factors: "take rows of W" is one statement, and what it means for ``up``, ``down`` or a magnitude is the kind's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from hubtool.types import Shape


@dataclass(frozen=True, slots=True)
class TakeRows:
    """W[start:stop]: one part of a fused weight."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TakeCols:
    """W[:, start:stop]."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class SwapHalves:
    """The two halves of the rows exchanged (scale/shift against shift/scale). Its own inverse."""


@dataclass(frozen=True, slots=True)
class Transpose:
    """W.T (Conv1D's fan_in_fan_out). Its own inverse."""


@dataclass(frozen=True, slots=True)
class ReshapeWeight:
    """Same elements, other shape: (o, i) <-> (o, i, 1, 1)."""

    shape: Shape


WeightOp: TypeAlias = TakeRows | TakeCols | SwapHalves | Transpose | ReshapeWeight
