"""Canonical modules -> the modules of an outside naming: renamed, turned, or fused; what cannot be is a loss with its reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from hubtool.adapters.ir import Adapter, ModuleKey, Patch
from hubtool.adapters.low_rank import LowRank
from hubtool.errors import Unsupported
from hubtool.layouts import tables, vocabulary
from hubtool.layouts.detect import size_of
from hubtool.layouts.emission import Emission, Loss
from hubtool.layouts.naming import Place
from hubtool.tensors.evaluate import chunks

Gathered = tuple[
    ModuleKey, str, Patch
]  # the module (a fused one by the paths of its parts), its outside name, its patch


def gather(adapter: Adapter, naming: str, family: str | None, out: Emission) -> Iterator[Gathered]:
    """Every module as ``naming`` keeps it, in the adapter's order. Losses and notes go to ``out``."""
    if naming == "raw" or family is None:
        yield from (((component, path), path, patch) for (component, path), patch in adapter.patches.items())
        return
    for component in adapter.components():
        patches = {path: patch for (owner, path), patch in adapter.patches.items() if owner == component}
        yield from _component(_Target(family, naming, component, _size(family, component, patches)), patches, out)


class _Target(NamedTuple):
    family: str
    naming: str
    component: str
    size: str | None

    def places(self) -> Mapping[str, Place]:
        return vocabulary.places(self.family, self.naming, self.component, self.size)


def _size(family: str, component: str, patches: Mapping[str, Patch]) -> str | None:
    return size_of(family, component, {path: patch.weight_shape for path, patch in patches.items()})


def _component(target: _Target, patches: Mapping[str, Patch], out: Emission) -> Iterator[Gathered]:
    settled = _taken_apart(target, patches)
    places = target.places()
    outsides = {place.outside: place for place in places.values()}
    done: set[str] = set()
    for path, patch in settled.items():
        place = places.get(path)
        if place is not None:
            if place.outside not in done:
                done.add(place.outside)
                yield from _made(target, place, settled, out)
        elif path in outsides:  # a fused module that could not be taken apart, and need not be
            yield (target.component, outsides[path].key), path, patch
        elif _changes_nothing(patch):
            out.notes.append(f"{target.component}.{path} is left out: its factors are zero")
        else:
            out.losses.append(_homeless(target, path, patch))


def _taken_apart(target: _Target, patches: Mapping[str, Patch]) -> dict[str, Patch]:
    """Fused modules that were kept whole, taken apart where they can be by now (after a promotion)."""
    found: dict[str, Patch] = {}
    for path, patch in patches.items():
        place = _source_place(target, path)
        found |= {path: patch} if place is None else _parts_of(patch, place, target) or {path: patch}
    return found


def _parts_of(patch: Patch, place: Place, target: _Target) -> dict[str, Patch] | None:
    from hubtool.layouts import placing  # and with it all that fusing needs: most conversions only rename

    try:
        return placing.canonical(patch, place, target.size or "")
    except Unsupported:
        return None


def _source_place(target: _Target, path: str) -> Place | None:
    """The place of a module that stands under an outside name; None for a canonical one."""
    if target.size is None or path in vocabulary.model(target.size):
        return None
    for naming in tables.family(target.family).namings:
        for place in vocabulary.places(target.family, naming, target.component, target.size).values():
            if place.outside == path and place.op != "rename":
                return place
    return None


def _changes_nothing(patch: Patch) -> bool:
    """Whether a plain low-rank change is zero: what fusing put in for a part that an adapter does not have."""
    if not isinstance(patch, LowRank) or patch.algorithm != "lora" or patch.rank == 0:
        return False
    if {role for role, _ in patch.roles()} - {"alpha", "down", "up"}:
        return False
    return not any(any(chunk) for chunk in chunks(patch.up))


def _homeless(target: _Target, path: str, patch: Patch) -> Loss:
    name = f"{target.component}.{path}"
    place = _source_place(target, path)
    if place is not None:
        from hubtool.layouts import placing

        try:
            placing.canonical(patch, place, target.size or "")
        except Unsupported as reason:
            return Loss(name, f"{reason}; --as lora may expand it")
    return Loss(name, f"{target.family} has no module of this name in {target.naming} naming")


def _made(target: _Target, place: Place, patches: Mapping[str, Patch], out: Emission) -> Iterator[Gathered]:
    if place.op == "rename":
        yield (target.component, place.key), place.outside, patches[place.parts[0]]
        return
    from hubtool.layouts import placing

    parts = {part: patches[part] for part in place.parts if part in patches}
    try:
        made = placing.outside(parts, place, target.size or "")
    except Unsupported as reason:
        out.losses += [Loss(f"{target.component}.{part}", str(reason)) for part in parts]
        return
    name = f"{target.component}.{place.outside}"
    if made.note and made.rounded:
        out.rounded[name] = made.note
    elif made.note:
        out.notes.append(f"{name}: {made.note}")
    yield (target.component, place.key), place.outside, made.patch
