"""How many ranks each module keeps: a number, a share of its energy, an error, a size; for every module by itself or over the whole file.

Over a file the singular values of all modules compete: one more rank of an m x n weight costs m + n numbers and saves sigma^2 of squared
error. Taking them by sigma^2 / (m + n) is the best that ranks of that cost can do, up to the last one taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from hubtool.errors import UsageProblem
from hubtool.ops.extract.spectrum import Spectrum, least, within

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Budget:
    """What was asked; everything None keeps every rank.

    ``rank``: at most so many a module. ``energy``: the share of the squared norm to keep. ``error``: the relative error to stay below
    (energy = 1 - error^2). ``size``: bytes that all factors together may take. ``across``: rank (then the average), energy and error are
    meant for the file as a whole. ``max_rank``: no module gets more ranks.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    size: int | None = None
    across: bool = False
    max_rank: int | None = None

    def __post_init__(self) -> None:
        asked = [one for one in (self.rank, self.energy, self.error, self.size) if one is not None]
        if len(asked) > 1:
            raise UsageProblem("say how many ranks in one way", hint="--rank, --energy, --error or --budget")
        if any(one is not None and one < 1 for one in (self.rank, self.size, self.max_rank)):
            raise UsageProblem("ranks and sizes are at least 1")
        if any(one is not None and not 0 < one < 1 for one in (self.energy, self.error)):
            raise UsageProblem("an energy or an error lies between 0 and 1")

    @property
    def needs_spectra(self) -> bool:
        """Whether ranks depend on the numbers themselves, so that these have to be read before anything is planned."""
        return any(one is not None for one in (self.energy, self.error, self.size)) or (
            self.across and self.rank is not None
        )

    @property
    def cap(self) -> int | None:
        """The most ranks that a module may get."""
        limits = [one for one in (self.max_rank, None if self.across else self.rank) if one is not None]
        return min(limits, default=None)

    @property
    def target(self) -> float | None:
        """The relative error to reach: keeping a share E of the energy is an error of sqrt(1 - E)."""
        return self.error if self.energy is None else (1 - self.energy) ** 0.5

    def to_json(self) -> dict[str, Any]:
        fields = ("rank", "energy", "error", "size", "max_rank")
        found = {name: value for name in fields if (value := getattr(self, name)) is not None}
        return {**found, "across": True} if self.across else found


def ranks(spectra: Mapping[K, Spectrum], costs: Mapping[K, int], budget: Budget) -> dict[K, int]:
    """The rank of every module; 0 for one that is not worth its place. ``costs``: bytes of one rank."""
    capped = [_capped(one, budget.cap) for one in spectra.values()]
    prices = [costs[key] for key in spectra]
    return dict(zip(spectra, _chosen(capped, prices, budget), strict=True))


def _chosen(spectra: list[Spectrum], prices: list[int], budget: Budget) -> list[int]:
    if budget.size is not None:
        return within(spectra, budget.size, prices, [0] * len(spectra))
    if budget.across and budget.rank is not None:
        even = sum(min(budget.rank, len(one.values)) * price for one, price in zip(spectra, prices, strict=True))
        return within(spectra, even, prices, [0] * len(spectra))
    if budget.target is None:
        return [len(one.values) for one in spectra]
    if budget.across:
        return least(spectra, budget.target, prices)
    return [one.rank_for(budget.target) for one in spectra]


def _capped(one: Spectrum, cap: int | None) -> Spectrum:
    """The spectrum as if no more than ``cap`` values had been computed."""
    if cap is None or cap >= len(one.values):
        return one
    rest = one.rest + sum(value * value for value in one.values[cap:])
    return replace(one, values=one.values[:cap], noise=one.noise[:cap], rest=rest)
