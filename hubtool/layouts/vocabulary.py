"""Module vocabularies: every module of a model with its parameter shapes, and look-up of any spelling of a name.

Names are never un-flattened by pattern: ``.`` -> ``_`` has no collision in any measured vocabulary, so a dictionary inverts it exactly.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from types import MappingProxyType

from hubtool import resources
from hubtool.errors import TableError
from hubtool.layouts.naming import PARTS, Naming, Place, compiled, numbered
from hubtool.layouts.tables import family
from hubtool.types import Shape

Modules = Mapping[str, Mapping[str, Shape]]
Entries = list[tuple[str, Mapping[str, Shape]]]
_OPTIONAL_HEAD = "text_model."  # transformers >= 5.6 drops it in CLIPTextModel; files exist in both forms
_NO_MODULE: Mapping[str, Shape] = MappingProxyType({})
_GROUP = re.compile(r"(.*?)\{(\d+)\.\.(\d+)\}")


@cache
def model(name: str) -> Modules:
    """Module path -> {parameter: shape} of one model, loaded once. ``""`` holds top-level parameters."""
    path = resources.schemas() / "vocabularies" / f"{name}.json.gz"
    return MappingProxyType(expand(json.loads(resources.unpacked(path))))


def expand(folded: Mapping[str, Mapping[str, Iterable[int]]]) -> dict[str, Mapping[str, Shape]]:
    """A vocabulary file with its ``{a..b}`` groups written out, in the model's order; modules of one line share their table of shapes."""
    shapes = {path: {name: tuple(shape) for name, shape in own.items()} for path, own in folded.items()}
    return dict(_expanded(list(shapes.items())))


def _expanded(entries: Entries) -> Entries:
    """Entries under the same leading group are neighbours: expand what follows the group once, then repeat it per index."""
    found: Entries = []
    for group, members in itertools.groupby(entries, key=lambda entry: _leading(entry[0])):
        if group is None:
            found += members
            continue
        before, first, last = group
        cut = len(f"{before}{{{first}..{last}}}")
        below = _expanded([(path[cut:], parameters) for path, parameters in members])
        for index in range(int(first), int(last) + 1):
            head = f"{before}{index}"
            found += [(head + tail, parameters) for tail, parameters in below]
    return found


def _leading(path: str) -> tuple[str, str, str] | None:
    match = _GROUP.match(path)
    return None if match is None else (match[1], match[2], match[3])


def models(name: str, component: str) -> tuple[str, ...]:
    """The models (sizes) that a family's component may be; empty when it has no such component."""
    return family(name).components.get(component, ())


@cache
def modules(name: str, component: str) -> Modules:
    """Every module of a component over all sizes of the family; shapes are those of the first size that has it."""
    merged: dict[str, Mapping[str, Shape]] = {}
    for one in reversed(models(name, component)):
        merged |= model(one)
    return MappingProxyType(merged)


@cache
def weight_shapes(name: str, component: str, path: str) -> tuple[Shape, ...]:
    """The shapes a module's weight has, one per size of the family that has it."""
    tables = (model(one).get(path, {}) for one in models(name, component))
    return tuple(dict.fromkeys(table["weight"] for table in tables if "weight" in table))


def weight_shape(name: str, component: str, path: str) -> Shape | None:
    """Shape of the module's weight in the first size of the family; None when the family has no such module."""
    tables = (
        model(one).get(path, _NO_MODULE) for one in models(name, component)
    )  # most are in the first: few are loaded
    return next((table["weight"] for table in tables if "weight" in table), None)


@cache
def places(name: str, naming: str, component: str, size: str | None = None) -> Mapping[str, Place]:
    """canonical path -> where ``naming`` keeps it, for one component (and one model of it; by default the first)."""
    chosen = size or next(iter(models(name, component)), None)
    if chosen is None:
        return MappingProxyType({})
    if naming.endswith(PARTS):
        return MappingProxyType(numbered(places(name, naming.removesuffix(PARTS), component, size)))
    return MappingProxyType(compiled(family(name).naming_of(component, naming), model(chosen)))


@cache
def spellings(name: str, component: str, joiner: str, size: str | None = None) -> Mapping[str, Place]:
    """spelled module -> its place, for one component and joiner (``.`` or ``_``), over all namings of the family."""
    table: dict[str, Place] = {}
    for spelled, place in _names(name, component, size or next(iter(models(name, component)), "")):
        if not spelled:
            continue  # parameters of the model itself: no adapter has a module without a name
        text = spelled if joiner == "." else spelled.replace(".", "_")
        known = table.setdefault(text, place)
        if known is not place and known.parts != place.parts:
            raise TableError(f"{name}: {text} is both {known.parts[0]} and {place.parts[0]}")
    return MappingProxyType(table)


def _names(name: str, component: str, size: str) -> Iterator[tuple[str, Place]]:
    paths = model(size) if size else ()
    for path in paths:
        yield path, Place("diffusers", path, (path,))
    for path in paths:
        if path.startswith(_OPTIONAL_HEAD):
            yield path.removeprefix(_OPTIONAL_HEAD), Place("diffusers", path, (path,))
    for naming in family(name).naming_tables:
        if naming.component == component:
            known = places(name, naming.id, component, size)
            for place in known.values():
                yield place.outside, place
            for place in places(name, naming.id + PARTS, component, size).values() if _fused(naming) else ():
                yield place.outside, place


def _fused(naming: Naming) -> bool:
    return any(row.op == "rows" for row in naming.rows)
