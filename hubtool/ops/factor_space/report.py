"""What a merge of adapters did, module by module and in total."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from hubtool.adapters.low_rank import LowRank
from hubtool.adapters.promote import to_lora
from hubtool.ops.factor_space import algebra
from hubtool.ops.factor_space.blend import Measured


@dataclass(frozen=True, slots=True)
class Module:
    """One module of the output. ``inputs``: how many of the inputs change it; ``ranks``: theirs, as low-rank factors; ``how``: ``copied``
    (inputs' own factors), ``exact`` (every rank kept), ``truncated``, ``summed`` (whole differences)."""

    inputs: int
    ranks: tuple[int, ...]
    rank: int | None
    how: str


@dataclass(slots=True)
class Report:
    """``matched``: modules that several inputs change; ``single``: that one input changes; ``unchanged``: whose strengths are all zero;
    ``dropped``: that a budget left no rank. ``measured`` fills while the plan is carried out; ``copied``: low-rank modules that are not computed."""

    inputs: int
    modules: dict[str, Module] = field(default_factory=dict)
    unchanged: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    measured: Measured = field(default_factory=Measured)
    copied: dict[str, LowRank] = field(default_factory=dict)
    _norms: dict[str, float] = field(default_factory=dict)

    @property
    def matched(self) -> int:
        return sum(one.inputs > 1 for one in self.modules.values())

    @property
    def single(self) -> int:
        return sum(one.inputs == 1 for one in self.modules.values())

    def errors(self) -> dict[str, float]:
        """||dW - out|| / ||dW|| of every module that was computed; copied ones have none."""
        return {name: _ratio(error, norm) for name, (norm, error) in sorted(self.measured.modules.items())}

    @property
    def error(self) -> float | None:
        """The same over all low-rank modules together, copied ones included; None before anything was computed.

        Reads the factors of copied modules the first time: their norms count.
        """
        if not self.measured.modules:
            return None
        for name in list(self.copied):
            self._norms[name] = _squared_norm(self.copied.pop(name))
        rows = self.measured.modules.values()
        norm = math.fsum(row[0] for row in rows) + math.fsum(self._norms.values())
        return _ratio(math.fsum(row[1] for row in rows), norm)

    def to_json(self) -> dict[str, Any]:
        errors = self.errors()
        return {
            "inputs": self.inputs,
            "modules": len(self.modules),
            "matched": self.matched,
            "single": self.single,
            "unchanged": len(self.unchanged),
            "dropped": self.dropped,
            "ranks": sorted({one.rank for one in self.modules.values() if one.rank is not None}),
            "relative_error": self.error,
            "worst": max(errors.items(), key=lambda row: row[1])[0] if errors else None,
            "notes": self.notes,
            "by_module": {name: self._row(name, one, errors) for name, one in self.modules.items()},
        }

    def _row(self, name: str, one: Module, errors: dict[str, float]) -> dict[str, Any]:
        row: dict[str, Any] = {"inputs": one.inputs, "ranks": list(one.ranks), "rank": one.rank, "how": one.how}
        return {**row, "relative_error": errors[name]} if name in errors else row


def _ratio(error: float, norm: float) -> float:
    return math.sqrt(max(error, 0.0) / norm) if norm > 0 else 0.0


def _squared_norm(patch: LowRank) -> float:
    from hubtool.tensors.evaluate import compute

    plain = to_lora(patch)
    up, down = (compute(tensor).float().flatten(1) for tensor in (plain.up, plain.down))
    return plain.scale**2 * algebra.product_norm(up, down)
