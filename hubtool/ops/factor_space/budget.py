"""How many ranks each module keeps: a number, a share of its energy, an error; for every module by itself or over the whole file.

Over a file the singular values of all modules compete: one more rank of an m x n weight costs m + n numbers and saves sigma^2 of squared
error. Taking them by sigma^2 / (m + n) is the best that any choice of ranks of that cost can do, up to the last one taken (the values of a
module descend, so a later one is never taken before an earlier one).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from hubtool.errors import UsageProblem

K = TypeVar("K")
_SLACK = 1e-12  # relative: targets that spectra meet exactly should not cost a rank by rounding


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular values of one module, descending; ``energy``: its squared norm; ``cost``: numbers that one rank takes (out + in)."""

    values: Sequence[float]
    energy: float
    cost: int


@dataclass(frozen=True, slots=True)
class Budget:
    """What was asked; everything None keeps every rank.

    ``rank``: at most so many a module. ``energy``: the share of the squared norm to keep, 0 to 1. ``error``: the relative error to stay
    below (energy = 1 - error^2). ``numbers``: how many numbers all factors together may have. ``across``: rank, energy and error are
    meant for the file as a whole (``rank`` then as the average). ``most``: no module gets more ranks.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    numbers: int | None = None
    across: bool = False
    most: int | None = None

    def __post_init__(self) -> None:
        targets = [one for one in (self.energy, self.error, self.numbers) if one is not None]
        if len(targets) > 1 or (self.across and self.rank is not None and targets):
            raise UsageProblem("one target only: an energy, an error or a size", hint="--max-rank may accompany it")
        for name in ("rank", "numbers", "most"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageProblem(f"{name} is {value}: at least 1 is needed")
        for name in ("energy", "error"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UsageProblem(f"{name} is {value:g}: a share between 0 and 1 is needed")

    @property
    def needs_spectra(self) -> bool:
        """Whether ranks depend on the numbers themselves, so that these have to be read before anything is planned."""
        asked = (self.energy, self.error, self.numbers)
        return any(one is not None for one in asked) or (self.across and self.rank is not None)

    @property
    def cap(self) -> int | None:
        """The most ranks that a module may get."""
        limits = [one for one in (self.most, None if self.across else self.rank) if one is not None]
        return min(limits, default=None)

    @property
    def share(self) -> float:
        """The share of energy that may be lost; negative when nothing was said."""
        if self.error is not None:
            return self.error**2
        return -1.0 if self.energy is None else 1.0 - self.energy

    def to_json(self) -> dict[str, Any]:
        fields = ("rank", "energy", "error", "numbers", "most")
        found = {name: value for name in fields if (value := getattr(self, name)) is not None}
        return {**found, "across": True} if self.across else found


def ranks(spectra: Mapping[K, Spectrum], budget: Budget) -> dict[K, int]:
    """The ranks that modules keep, at least one each."""
    if budget.numbers is not None:
        return _spent(spectra, budget.numbers, budget.cap)
    if budget.across and budget.rank is not None:
        return _spent(spectra, sum(budget.rank * one.cost for one in spectra.values()), budget.cap)
    if budget.across and budget.share >= 0:
        return _allowed(spectra, budget.share * sum(one.energy for one in spectra.values()), budget.cap)
    return {key: _own(one, budget) for key, one in spectra.items()}


def _own(one: Spectrum, budget: Budget) -> int:
    """Ranks of a module that is looked at alone."""
    most = min(len(one.values), budget.cap or len(one.values))
    if budget.share < 0:
        return max(most, 1)
    allowed = budget.share * one.energy + _SLACK * one.energy
    lost = one.energy
    for count, value in enumerate(one.values[:most]):
        if lost <= allowed:
            return max(count, 1)
        lost -= value * value
    return max(most, 1)


def _queue(spectra: Mapping[K, Spectrum], cap: int | None) -> Iterator[tuple[K, float, int]]:
    """(module, squared value, cost) of every rank beyond a module's first, the most worth taking first."""
    rows = (
        (value * value / one.cost, place, index, key, value * value, one.cost)
        for place, (key, one) in enumerate(spectra.items())
        for index, value in enumerate(itertools.islice(one.values, 1, cap), 1)
    )
    for _, _, _, key, gain, cost in sorted(rows, key=lambda row: (-row[0], row[1], row[2])):
        yield key, gain, cost


def _spent(spectra: Mapping[K, Spectrum], numbers: int, cap: int | None) -> dict[K, int]:
    """Ranks bought until the numbers are used up; a module that became too dear is passed over, so that cheaper ones use the rest."""
    found = dict.fromkeys(spectra, 1)
    left = numbers - sum(one.cost for one in spectra.values())
    if left < 0:
        least = numbers - left
        raise UsageProblem(f"a rank for each of {len(spectra)} modules takes {least} numbers, and {numbers} are allowed")
    full: set[K] = set()
    for key, _, cost in _queue(spectra, cap):
        if key in full or cost > left:
            full.add(key)
            continue
        found[key] += 1
        left -= cost
    return found


def _allowed(spectra: Mapping[K, Spectrum], allowed: float, cap: int | None) -> dict[K, int]:
    """Ranks bought until no more than ``allowed`` of the squared norm is missing."""
    found = dict.fromkeys(spectra, 1)
    total = math.fsum(one.energy for one in spectra.values())
    lost = total - math.fsum(one.values[0] ** 2 for one in spectra.values() if one.values)
    for key, gain, _ in _queue(spectra, cap):
        if lost <= allowed + _SLACK * total:
            break
        found[key] += 1
        lost -= gain
    return found
