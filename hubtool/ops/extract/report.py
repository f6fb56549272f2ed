"""What an extraction found and kept, module by module and in total."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hubtool.ops.extract.spectrum import Spectrum


@dataclass(frozen=True, slots=True)
class Module:
    """One decomposed module. ``change``: ||dW||; ``error``: ||dW - out|| / ||dW|| with the numbers as they are written;
    ``bound``: that error against the optimum's at this rank, as estimated (1 for an exact decomposition)."""

    name: str
    shape: tuple[int, ...]
    rank: int
    change: float
    error: float
    bound: float
    products: int

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], rank: int, spectrum: Spectrum) -> Module:
        change = math.sqrt(spectrum.energy)
        return cls(name, shape, rank, change, spectrum.relative_error(rank), spectrum.bound, spectrum.products)

    def to_json(self) -> dict[str, Any]:
        return {
            "module": self.name,
            "shape": list(self.shape),
            "rank": self.rank,
            "change": self.change,
            "error": self.error,
            "bound": self.bound,
            "products": self.products,
        }


@dataclass(frozen=True, slots=True)
class Component:
    """Modules (decomposed) and parameters (kept as differences) of a component that changed, and those that did not."""

    changed: int
    unchanged: int

    def to_json(self) -> dict[str, int]:
        return {"changed": self.changed, "unchanged": self.unchanged}


@dataclass(frozen=True, slots=True)
class Report:
    """``left``: reason -> changed parameters that are not in the output. ``missed``: modules above the error that was asked for."""

    family: str
    modules: tuple[Module, ...]
    dense: tuple[str, ...]
    components: Mapping[str, Component]
    left: Mapping[str, Sequence[str]]
    only_base: tuple[str, ...]
    only_tuned: tuple[str, ...]
    missed: tuple[str, ...] = ()

    @property
    def error(self) -> float | None:
        """||dW - out|| / ||dW|| over everything that was decomposed; None where nothing was."""
        energy = sum(one.change**2 for one in self.modules)
        return math.sqrt(sum((one.error * one.change) ** 2 for one in self.modules) / energy) if energy else None

    def to_json(self) -> dict[str, Any]:
        ranks = sorted({one.rank for one in self.modules})
        return {
            "family": self.family,
            "error": self.error,
            "energy": None if self.error is None else 1 - self.error**2,
            "ranks": ranks,
            "components": {name: one.to_json() for name, one in self.components.items()},
            "modules": [one.to_json() for one in self.modules],
            "differences": list(self.dense),
            "left_out": {reason: list(names) for reason, names in self.left.items()},
            "only_base": list(self.only_base),
            "only_tuned": list(self.only_tuned),
            "missed": list(self.missed),
        }
