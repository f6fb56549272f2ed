"""Modules that the output's layout keeps fused (q, k and v in one weight) are merged as one: low-rank changes of the parts share a factor.

Merged apart they would share none, and side by side need three times the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from hubtool.adapters.ir import Adapter, ModuleKey, Patch
from hubtool.errors import Unsupported
from hubtool.layouts import placing, vocabulary
from hubtool.layouts.detect import size_of
from hubtool.layouts.naming import Place
from hubtool.types import Shape

Patches = Mapping[ModuleKey, Patch]


def together(
    adapters: Sequence[Adapter], naming: str, family: str | None, alike: Callable[[Sequence[ModuleKey]], bool]
) -> tuple[list[Adapter], dict[ModuleKey, ModuleKey]]:
    """The adapters with the parts of ``naming``'s fused modules as one patch, under the outside path, wherever all of them allow it; and
    outside path -> first part.

    ``alike``: whether these parts may be treated as one (the same strengths).
    """
    whole: dict[ModuleKey, ModuleKey] = {}
    if family is None or naming == "raw":
        return list(adapters), whole
    patches = [dict(adapter.patches) for adapter in adapters]
    for component in dict.fromkeys(component for adapter in adapters for component, _ in adapter.patches):
        size = size_of(family, component, _shapes(adapters, component))
        for place in _fused_places(family, naming, component, size):
            keys = [(component, part) for part in place.parts]
            if size is not None and alike(keys) and _join((component, place.outside), keys, place, size, patches):
                whole[component, place.outside] = keys[0]
    made = [replace(one, patches=MappingProxyType(own)) for one, own in zip(adapters, patches, strict=True)]
    return made, whole


def _shapes(adapters: Sequence[Adapter], component: str) -> dict[str, Shape | None]:
    rows = (row for adapter in adapters for row in adapter.patches.items())
    return {path: patch.weight_shape for (owner, path), patch in rows if owner == component}


def _fused_places(family: str, naming: str, component: str, size: str | None) -> Iterator[Place]:
    seen: set[str] = set()
    for place in vocabulary.places(family, naming, component, size).values():
        if place.op == "rows" and place.outside not in seen:
            seen.add(place.outside)
            yield place


def _join(
    key: ModuleKey, parts: Sequence[ModuleKey], place: Place, size: str, patches: Sequence[dict[ModuleKey, Patch]]
) -> bool:
    """Replace the parts by the whole in every adapter, or in none."""
    made: list[Patch | None] = []
    try:
        for own in patches:
            present = {path: own[component, path] for component, path in parts if (component, path) in own}
            made.append(placing.outside(present, place, size).patch if present else None)
    except Unsupported:
        return False
    for own, patch in zip(patches, made, strict=True):
        if patch is not None:
            for part in parts:
                own.pop(part, None)
            own[key] = patch
    return any(patch is not None for patch in made)
