"""What a merge of adapters did, module by module and in total."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from hubtool.adapters.ir import Patch
from hubtool.ops.factor_space import copies
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
    ``dropped``: that a budget left no rank. ``measured`` fills while the plan is carried out; ``copied``: modules that are not computed, which are cast to
    ``dtype`` where one was asked for."""

    inputs: int
    modules: dict[str, Module] = field(default_factory=dict)
    unchanged: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    measured: Measured = field(default_factory=Measured)
    copied: dict[str, Patch] = field(default_factory=dict)
    dtype: str | None = None
    _known: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def matched(self) -> int:
        return sum(one.inputs > 1 for one in self.modules.values())

    @property
    def single(self) -> int:
        return sum(one.inputs == 1 for one in self.modules.values())

    @property
    def cast(self) -> list[str]:
        """Copied modules that the output's dtype rounds."""
        return [name for name, patch in self.copied.items() if copies.rounded(patch, self.dtype)]

    def errors(self) -> dict[str, float]:
        """||dW - out|| / ||dW|| of every module that was computed or cast; those that keep their numbers have none."""
        rows = {**self.measured.modules, **{name: self._copy(name) for name in self.cast}} if self._carried_out else {}
        return {name: _ratio(error, norm) for name, (norm, error) in sorted(rows.items())}

    @property
    def error(self) -> float | None:
        """The same over all modules whose change is known without the base, copied ones included; None where nothing was rounded or the
        plan was not carried out.

        Reads the factors of copied modules the first time: their norms count.
        """
        if not self._carried_out or not (self.measured.modules or self.cast):
            return None
        rows = [*self.measured.modules.values(), *map(self._copy, self.copied)]
        return _ratio(math.fsum(row[1] for row in rows), math.fsum(row[0] for row in rows))

    @property
    def _carried_out(self) -> bool:
        """Whether whatever had to be computed has been computed. A plan of copies alone is known beforehand."""
        return bool(self.measured.modules) or all(one.how == "copied" for one in self.modules.values())

    def _copy(self, name: str) -> tuple[float, float]:
        if name not in self._known:
            self._known[name] = copies.measured(self.copied[name], self.dtype)
        return self._known[name]

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
            "cast": len(self.cast),
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
