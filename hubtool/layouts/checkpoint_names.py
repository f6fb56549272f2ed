"""Names of a checkpoint's parameters under a naming, both ways.

A checkpoint carries its whole inventory, so its own keys say how deep it is: rows are matched against them and need no vocabulary. That
is how pruned, widened and tiny models convert through the same tables as the published sizes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from hubtool.layouts.naming import Row

_LAST, _BELOW = "{last}", "{*}"
_INDEX = re.compile(r"\d+|\{\w+\}")
Holes = dict[str, str]


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a tensor called ``key`` outside belongs: the canonical keys it holds, in row order (one unless ``op`` is ``rows``)."""

    key: str
    parts: tuple[str, ...]
    op: str = "rename"


@dataclass(frozen=True, slots=True)
class _Entry:
    """One side of a row: ``template`` is its outside name, or its ``index``-th canonical name."""

    row: Row
    template: tuple[str, ...]
    index: int


class Names:
    """Rows compiled for the keys of one file: ``inward`` maps outside keys to canonical ones, ``outward`` the other way.

    ``keys`` are those of the side that is asked for; they decide what ``{last}`` means. A key that no row fits keeps its name.
    """

    def __init__(self, rows: Sequence[Row], keys: Iterable[str], *, inward: bool) -> None:
        self._inward = inward
        self._keys = keys
        self._lasts: dict[tuple[str, ...], int] = {}
        self._exact: dict[tuple[str, ...], list[_Entry]] = {}
        self._below: dict[tuple[str, ...], list[_Entry]] = {}
        for row in rows:
            for index, text in enumerate((row.outside,) if inward else row.parts):
                self._add(_Entry(row, tuple(_segments(text)), index))

    def _add(self, entry: _Entry) -> None:
        open_end = entry.template[-1:] == (_BELOW,)
        book = self._below if open_end else self._exact
        book.setdefault(_form(entry.template[:-1] if open_end else entry.template), []).append(entry)

    def spot(self, key: str) -> Spot:
        """Where the tensor ``key`` (outside key when inward, canonical key when outward) belongs."""
        path, _, parameter = key.rpartition(".")
        module = tuple(_segments(path))
        for entry in self._candidates(module):
            found = self._found(entry, module, parameter)
            if found is not None:
                return found
        return Spot(key, (key,))

    def _candidates(self, module: tuple[str, ...]) -> Iterator[_Entry]:
        yield from self._exact.get(_form(module), ())
        for length in range(len(module) - 1, 0, -1) if self._below else ():
            yield from self._below.get(_form(module[:length]), ())

    def _found(self, entry: _Entry, module: tuple[str, ...], parameter: str) -> Spot | None:
        holes = self._holes(entry.template, module)
        names = _parameters(entry.row, parameter, self._inward)
        if holes is None or names is None:
            return None
        outside, canonical = names
        parts = tuple(_joined(_fill(part, holes), canonical) for part in entry.row.parts)
        return Spot(_joined(_fill(entry.row.outside, holes), outside), parts, entry.row.op)

    def _holes(self, template: tuple[str, ...], module: tuple[str, ...]) -> Holes | None:
        """What the holes of a template of the right form hold; None when a fixed index or ``{last}`` differs."""
        holes: Holes = {}
        for at, (want, have) in enumerate(zip(template, module, strict=False)):
            if want == _BELOW:
                return holes | {_BELOW: ".".join(module[at:])}
            if want == _LAST and int(have) != self._last(template[:at], module[:at]):
                return None
            hole = _hole(want)
            if hole is not None:
                name, before, after = hole
                holes[name] = have[len(before) : len(have) - len(after)]
            elif want != have:
                return None
        return holes

    def _last(self, template: tuple[str, ...], head: tuple[str, ...]) -> int:
        """The highest index that follows ``head`` in the file."""
        if head not in self._lasts:
            start = ".".join(head) + "."
            indices = (key[len(start) :].partition(".")[0] for key in self._keys if key.startswith(start))
            self._lasts[head] = max((int(text) for text in indices if text.isdecimal()), default=-1)
        return self._lasts[head]


def _parameters(row: Row, parameter: str, inward: bool) -> tuple[str, str] | None:
    """(outside, canonical) names of a parameter; None where the row speaks only of others."""
    table = row.parameters if inward else {inner: outer for outer, inner in row.parameters.items()}
    if parameter in table:
        other = table[parameter]
        return (parameter, other) if inward else (other, parameter)
    # a row whose module is the whole model would take every bare parameter there is
    return None if row.parameters and not (row.outside and all(row.parts)) else (parameter, parameter)


def _segments(path: str) -> Sequence[str]:
    return path.split(".") if path else ()


def _form(segments: Sequence[str]) -> tuple[str, ...]:
    """The path with every index as ``#``: a handful of rows share one, and what stands around a hole is already compared."""
    return tuple(map(_numbered, segments))


@lru_cache(maxsize=65536)
def _numbered(segment: str) -> str:
    return _INDEX.sub("#", segment)


@lru_cache(maxsize=65536)
def _hole(segment: str) -> tuple[str, str, str] | None:
    """(hole, text before, text after) of a template's segment; None when it is fixed."""
    before, brace, rest = segment.partition("{")
    name, _, after = rest.partition("}")
    return ("{" + name + "}", before, after) if brace else None


def _fill(template: str, holes: Mapping[str, str]) -> str:
    for name, text in holes.items():
        template = template.replace(name, text)
    return template


def _joined(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter
