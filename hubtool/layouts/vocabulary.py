"""Module vocabularies: every module of a family with its parameter shapes, and look-up of any spelling of a name.

Names are never un-flattened by pattern: ``.`` -> ``_`` has no collision in any measured vocabulary, so a dictionary inverts it exactly.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from hubtool import resources
from hubtool.errors import TableError
from hubtool.layouts.tables import Naming, family
from hubtool.types import Shape

_OPTIONAL_HEAD = "text_model."  # transformers >= 5.6 drops it in CLIPTextModel; files exist in both forms


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """``modules``: component -> canonical module -> {parameter: shape}."""

    family: str
    modules: Mapping[str, Mapping[str, Mapping[str, Shape]]]

    def weight_shape(self, component: str, path: str) -> Shape | None:
        """Shape of the module's weight; None when the family has no such module."""
        shape = self.modules.get(component, {}).get(path, {}).get("weight")
        return None if shape is None else tuple(shape)


@cache
def vocabulary(name: str) -> Vocabulary:
    """The vocabulary of a family, loaded once."""
    path = resources.schemas() / "vocabularies" / f"{name}.json.gz"
    return Vocabulary(name, json.loads(gzip.decompress(path.read_bytes())))


@cache
def spellings(name: str, component: str, joiner: str) -> Mapping[str, tuple[str, str]]:
    """spelled module -> (naming, canonical path), for one component and joiner (``.`` or ``_``)."""
    table: dict[str, tuple[str, str]] = {}
    for naming, spelled, canonical in _names(name, component):
        text = spelled if joiner == "." else spelled.replace(".", "_")
        known = table.setdefault(text, (naming, canonical))
        if known[1] != canonical:
            raise TableError(f"{name}: {text} is both {known[1]} and {canonical}")
    return MappingProxyType(table)


def _names(name: str, component: str) -> Iterator[tuple[str, str, str]]:
    modules = vocabulary(name).modules.get(component, {})
    for path in modules:
        yield "diffusers", path, path
    for path in modules:
        if path.startswith(_OPTIONAL_HEAD):
            yield "diffusers", path.removeprefix(_OPTIONAL_HEAD), path
    for naming in family(name).namings.values():
        if naming.component == component:
            for path in modules:
                yield naming.id, outside(naming, path), path


def outside(naming: Naming, canonical: str) -> str:
    """The name that ``naming`` gives to a canonical module. A module no row covers keeps its name (its parents do not exist outside)."""
    for text, path in naming.rows.items():
        if path == canonical:
            return text
    for text, block, leaves in naming.blocks:
        if not canonical.startswith(block + "."):
            continue
        leaf = canonical[len(block) + 1 :]
        if leaves is None:
            return f"{text}.{leaf}"
        for outer, inner in leaves.items():
            if inner == leaf:
                return f"{text}.{outer}"
    return canonical


@cache
def written(name: str, naming: str, component: str) -> Mapping[str, str]:
    """canonical path -> the spelling that ``naming`` writes (dotted), for one component."""
    table = family(name).namings.get(naming)
    modules = vocabulary(name).modules.get(component, {})
    if table is None or table.component != component:
        return MappingProxyType({path: path for path in modules})
    return MappingProxyType({path: outside(table, path) for path in modules})
