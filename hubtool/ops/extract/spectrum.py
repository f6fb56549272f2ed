"""What is known of a module's change after its decomposition, and how many ranks each module gets."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular values of a change, as far as they were computed.

    ``energy``: squared norm of the change; ``rest``: squared error at the full computed rank, measured; ``noise``: what rounding each
    rank's factors to the output's dtype adds to the squared error. ``bound``: estimated error at the full rank against the optimum's.
    """

    values: tuple[float, ...]
    energy: float
    rest: float
    noise: tuple[float, ...]
    bound: float = 1.0
    products: int = 0

    def error(self, rank: int) -> float:
        """Squared error at a rank up to the computed one."""
        return self.rest + sum(v * v for v in self.values[rank:]) + sum(self.noise[:rank])

    def relative_error(self, rank: int) -> float:
        """||dW - out|| / ||dW||."""
        return math.sqrt(max(self.error(rank), 0.0) / self.energy) if self.energy else 0.0

    def rank_for(self, error: float) -> int:
        """The least rank with a relative error of at most ``error``; the computed one where none is enough."""
        allowed = error * error * self.energy
        captured = accumulate((v * v for v in self.values), initial=0.0)
        full = self.rest + sum(v * v for v in self.values)
        return next((rank for rank, kept in enumerate(captured) if full - kept <= allowed), len(self.values))


def least(spectra: Sequence[Spectrum], error: float, costs: Sequence[int]) -> list[int]:
    """Ranks that together cost least bytes with a relative error of at most ``error`` over the whole file; all where none are enough.

    ``costs``: bytes of one rank of each module.
    """
    allowed = error * error * sum(one.energy for one in spectra)
    left = sum(one.rest + sum(v * v for v in one.values) for one in spectra)
    ranks = [0] * len(spectra)
    for gain, index, _ in _best_first(spectra, costs):
        if left <= allowed:
            break
        ranks[index] += 1
        left -= gain
    return ranks


def within(spectra: Sequence[Spectrum], budget: int, costs: Sequence[int], overheads: Sequence[int]) -> list[int]:
    """Ranks that make the error least within ``budget`` bytes. ``overheads``: bytes that a module costs beside its ranks (alpha, names)."""
    ranks, left = [0] * len(spectra), budget
    closed: set[int] = set()
    for _, index, cost in _best_first(spectra, costs):
        price = cost + (0 if ranks[index] else overheads[index])
        if index in closed or price > left:
            closed.add(index)  # ranks of a module are bought in their order
            continue
        ranks[index] += 1
        left -= price
    return ranks


def _best_first(spectra: Sequence[Spectrum], costs: Sequence[int]) -> list[tuple[float, int, int]]:
    """(energy gained, module, bytes) of every rank, those first that gain most for a byte; a module's own ranks stay in order."""
    queue = [
        (-(one.values[0] ** 2) / cost, index, 0)
        for index, (one, cost) in enumerate(zip(spectra, costs, strict=True))
        if one.values
    ]
    heapq.heapify(queue)
    order: list[tuple[float, int, int]] = []
    while queue:
        _, index, rank = heapq.heappop(queue)
        values, cost = spectra[index].values, costs[index]
        order.append((values[rank] ** 2, index, cost))
        if rank + 1 < len(values):
            heapq.heappush(queue, (-(values[rank + 1] ** 2) / cost, index, rank + 1))
    return order
