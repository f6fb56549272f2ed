"""What differs: numbers of one tensor or module, and of the files as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hubtool.types import Shape

OTHER = "(no component)"  # tensors that are no weights: position ids, a scheduler's buffers, EMA copies
NOISE = 1e-12  # relative: what fp64 arithmetic on factors cannot tell from nothing


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over all elements of a and b: a*a, b*b, a*b, (b-a)*(b-a), and the largest |b-a|. What comes in pieces adds up."""

    first: float = 0.0
    second: float = 0.0
    product: float = 0.0
    change: float = 0.0
    most: float = 0.0

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.first + other.first,
            self.second + other.second,
            self.product + other.product,
            self.change + other.change,
            self.most if self.most > other.most or math.isnan(self.most) else other.most,
        )

    @property
    def relative(self) -> float | None:
        """||b - a|| / ||a||; None where a is zero and b is not."""
        if not self.first:
            return 0.0 if not self.change else None
        return math.sqrt(self.change / self.first)

    @property
    def cosine(self) -> float | None:
        """None where one of them is zero."""
        size = math.sqrt(self.first) * math.sqrt(self.second)
        return max(-1.0, min(1.0, self.product / size)) if size else None

    @property
    def equal(self) -> bool:
        return self.change == 0 or self.change <= NOISE**2 * self.first


@dataclass(frozen=True, slots=True)
class Angles:
    """Principal angles of two subspaces in degrees. ``overlap``: ||Q1.T Q2||^2 / min(k1, k2): 1 where one contains the other."""

    smallest: float
    mean: float
    largest: float
    overlap: float

    def to_json(self) -> dict[str, float]:
        return {"smallest": self.smallest, "mean": self.mean, "largest": self.largest, "overlap": self.overlap}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor or an adapter's module that both files have. ``outputs`` and ``inputs``: angles between the spaces that two low-rank
    changes write to and read from. ``note``: why the numbers are not those of the change itself."""

    name: str
    component: str
    moments: Moments
    identical: bool
    outputs: Angles | None = None
    inputs: Angles | None = None
    ranks: tuple[int | None, int | None] | None = None
    note: str | None = None

    @property
    def equal(self) -> bool:
        return self.identical or self.moments.equal

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "name": self.name,
            "equal": self.equal,
            "change": self.moments.relative,
            "cosine": self.moments.cosine,
            "max_abs": self.moments.most,
        }
        document |= {"ranks": list(self.ranks)} if self.ranks else {}
        if self.outputs is not None and self.inputs is not None:
            document |= {"angles": {"outputs": self.outputs.to_json(), "inputs": self.inputs.to_json()}}
        return document | ({"note": self.note} if self.note else {})


@dataclass(frozen=True, slots=True)
class Unlike:
    """A property (shape, dtype, algorithm) that differs."""

    name: str
    first: Any
    second: Any

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "first": self.first, "second": self.second}


@dataclass(frozen=True, slots=True)
class Difference:
    """``kind``: ``adapters``, ``checkpoints`` or ``tensors``. ``alone``: moments of what only one side has (it counts as zeros on the other).

    ``unknown``: names that cannot be compared, with the reason.
    """

    kind: str
    family: str | None
    entries: tuple[Entry, ...]
    only_first: tuple[str, ...] = ()
    only_second: tuple[str, ...] = ()
    shapes: tuple[Unlike, ...] = ()
    dtypes: tuple[Unlike, ...] = ()
    alone: Moments = Moments()
    unknown: Mapping[str, str] | None = None

    @property
    def equal(self) -> bool:
        """Whether both hold the same numbers under the same names; dtypes of adapters' factors and all metadata are beside the point."""
        missing = self.only_first or self.only_second or self.shapes or self.unknown
        return not missing and all(entry.equal for entry in self.entries)

    @property
    def total(self) -> Moments:
        return sum((entry.moments for entry in self.entries if entry.component != OTHER), self.alone)

    @property
    def similarity(self) -> float | None:
        """The cosine of everything that both files hold, as one vector: of the changes for adapters, of the weights for checkpoints."""
        return 1.0 if self.equal else self.total.cosine

    def largest(self, count: int) -> list[Entry]:
        """The entries that differ most."""
        different = [entry for entry in self.entries if not entry.equal]
        return sorted(different, key=_weight, reverse=True)[:count]

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "family": self.family,
            "equal": self.equal,
            "similarity": self.similarity,
            "change": self.total.relative,
            "max_abs": self.total.most,
            "compared": len(self.entries),
            "different": sum(not entry.equal for entry in self.entries),
            "components": _components(self.entries),
            "only_first": list(self.only_first),
            "only_second": list(self.only_second),
            "shapes": [one.to_json() for one in self.shapes],
            "dtypes": [one.to_json() for one in self.dtypes],
            "unknown": dict(self.unknown or {}),
            "entries": [entry.to_json() for entry in self.entries],
        }


def _weight(entry: Entry) -> float:
    """The change against the larger of the two: a bias that was zero before is not the largest change of all."""
    size = max(entry.moments.first, entry.moments.second)
    weight = math.sqrt(entry.moments.change / size) if size else 0.0
    return math.inf if math.isnan(weight) else weight


def _components(entries: Iterable[Entry]) -> dict[str, Any]:
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.component, []).append(entry)
    return {name: _component(own) for name, own in found.items()}


def _component(own: list[Entry]) -> dict[str, Any]:
    total = sum((entry.moments for entry in own), Moments())
    different = sum(not entry.equal for entry in own)
    return {"compared": len(own), "different": different, "change": total.relative, "cosine": total.cosine}


def unlike_shapes(name: str, first: Shape, second: Shape) -> Unlike:
    """Two shapes as lists, as JSON has them."""
    return Unlike(name, list(first), list(second))
