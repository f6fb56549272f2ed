"""Which family a set of modules belongs to: names first, then shapes. Ambiguity is reported as a set, never guessed away."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from hubtool.layouts import index, tables, vocabulary
from hubtool.layouts.naming import Place
from hubtool.tensors.dtypes import numel
from hubtool.types import Shape

_STACK = re.compile(r"(.*?)\.(\d+)(?=\.|$)")

Stem = tuple[str, tuple[str, ...], str]  # the prefix, the components it may mean, and the module as spelled


@dataclass(slots=True, eq=False, repr=False)
class Module:
    """A module as a file spells it. ``out``, ``inner``: rows and in * kh * kw of its weight as far as the factors tell; None where they do not."""

    components: tuple[str, ...]
    stem: str
    out: int | None = None
    inner: int | None = None
    prefix: str = ""
    key: Stem = field(init=False)

    def __post_init__(self) -> None:
        self.key = self.prefix, self.components, self.stem  # asked for many times a module


class Fit(NamedTuple):
    """How one model explains the modules of one component. ``found``: stem -> (place, whether the shape agrees; None: not to be told).

    ``wrong``: shapes that contradict; ``ends``: every stack of blocks that the file touches is touched to its last block.
    """

    component: str
    model: str
    found: Mapping[Stem, tuple[Place, bool | None]]
    wrong: int
    ends: bool

    @property
    def score(self) -> tuple[int, int, bool]:
        """Names found less the shapes that contradict, then names found, then whether the file reaches this model's last blocks."""
        return len(self.found) - self.wrong, len(self.found), self.ends

    def agreement(self, modules: Iterable[Module]) -> tuple[int, int]:
        """(modules whose shape agrees, modules whose name is known) among ``modules``."""
        hits = [self.found[module.key][1] for module in modules if module.key in self.found]
        return sum(map(bool, hits)), len(hits)


def _deepest(paths: Iterable[str]) -> dict[str, int]:
    """stack of blocks -> its highest index: ``transformer_blocks`` -> 18."""
    stacks: dict[str, int] = {}
    for path in paths:
        found = _STACK.match(path)
        if found:
            stacks[found[1]] = max(stacks.get(found[1], -1), int(found[2]))
    return stacks


class Match(NamedTuple):
    """How one family explains the modules. ``found``: stem -> (component, place); ``sizes``: component -> the model it fits best.

    ``ends``: every component of the file reaches the last blocks of its model.
    """

    family: str
    found: Mapping[Stem, tuple[str, Place]]
    sizes: Mapping[str, str]
    contradictions: tuple[str, ...]
    checked: int
    ends: bool

    @property
    def score(self) -> tuple[int, int]:
        return len(self.found) - len(self.contradictions), len(self.found)


def match(modules: Iterable[Module], joiner: str, family: str | None = None) -> tuple[Match, ...]:
    """Matches of the best families: most names found whose shapes agree. Several when the file cannot tell.

    With ``family`` only that one is tried.
    """
    listed = tuple(modules)
    claimed = Counter(module.components for module in listed)
    best: list[Match] = []
    for name, most in _possible(listed, family):
        if best and most < best[0].score[0]:
            break  # no family from here on can reach what another has
        if best and _claimable(name, claimed) < best[0].score[0]:
            continue  # nor can one without the file's components
        one = _match(name, listed, joiner)
        if not one.found or (best and one.score < best[0].score):
            continue
        best = [*best, one] if best and one.score == best[0].score else [one]
    return tuple(sorted(best, key=lambda one: one.family))


def _claimable(name: str, claimed: Mapping[tuple[str, ...], int]) -> int:
    """How many modules lie in components that the family has."""
    own = {"*", *tables.family(name).components}
    return sum(count for components, count in claimed.items() if not own.isdisjoint(components))


def _possible(modules: Sequence[Module], family: str | None) -> Iterable[tuple[str, int]]:
    """(family, the most modules it could know), the likeliest first."""
    if family is not None:
        return [(tables.family(family).id, len(modules))]
    return index.shortlist([module.stem for module in modules])


def _match(name: str, modules: tuple[Module, ...], joiner: str) -> Match:
    fits_ = [fit for component in tables.family(name).components for fit in [_best(name, component, modules, joiner)]]
    groups: dict[str, list[Module]] = {}
    for module in modules:
        groups.setdefault(module.prefix, []).append(module)
    found: dict[Stem, tuple[str, Place]] = {}
    wrong: list[str] = []
    checked = 0
    for group in groups.values():
        ranked = sorted(fits_, key=lambda fit: fit.agreement(group), reverse=True)
        for key in (module.key for module in group):
            fit = _owner(key, ranked)
            if fit is None:
                continue
            place, agrees = fit.found[key]
            found[key] = fit.component, place
            checked += agrees is not None
            if agrees is False:
                wrong.append(place.parts[0])
    return Match(name, found, {fit.component: fit.model for fit in fits_}, tuple(wrong), checked, _end(fits_, found))


def _owner(key: Stem, ranked: list[Fit]) -> Fit | None:
    """The component a module belongs to: one whose weight has its shape, else the one that explains most under its prefix."""
    first: Fit | None = None
    for fit in ranked:
        hit = fit.found.get(key)
        if hit is not None:
            if hit[1]:
                return fit
            first = first or fit
    return first


def _end(fits_: list[Fit], found: Mapping[Stem, tuple[str, Place]]) -> bool:
    used = {component for component, _ in found.values()}
    return all(fit.ends for fit in fits_ if fit.component in used)


def _best(name: str, component: str, modules: tuple[Module, ...], joiner: str) -> Fit:
    """The size of the component that explains most; families list their commonest size first."""
    mine = [module for module in modules if module.components == ("*",) or component in module.components]
    best: Fit | None = None
    for size in vocabulary.models(name, component):
        fit = _fit(name, component, size, mine, joiner)
        best = fit if best is None or fit.score > best.score else best
        if best.score[0] == len(mine) and (best.ends or not mine):
            break  # nothing fits better than every name and every shape, to the last block
    assert best is not None, f"{name}: {component} has no models"
    return best


def _fit(name: str, component: str, size: str, modules: list[Module], joiner: str) -> Fit:
    found: dict[Stem, tuple[Place, bool | None]] = {}
    known = vocabulary.spellings(name, component, joiner, size) if modules else {}
    for module in modules:
        place = known.get(module.stem)
        if place is not None:
            found[module.key] = place, _agrees(module, place, size)
    wrong = sum(agrees is False for _, agrees in found.values())
    return Fit(component, size, found, wrong, _reaches_the_end(found, size))


def _reaches_the_end(found: Mapping[Stem, tuple[Place, bool | None]], size: str) -> bool:
    touched = _deepest(part for place, _ in found.values() for part in place.parts)
    last = _last_blocks(size) if touched else {}
    return bool(touched) and all(index == last.get(stack) for stack, index in touched.items())


@cache
def _last_blocks(size: str) -> Mapping[str, int]:
    return _deepest(vocabulary.model(size))


def _agrees(module: Module, place: Place, size: str) -> bool | None:
    if place.op == "rename":
        shape = vocabulary.model(size)[place.parts[0]].get("weight")
        return None if shape is None or module.out is None else fits(module, shape)
    shapes = [vocabulary.model(size).get(part, {}).get("weight") for part in place.parts]
    if module.out is None or None in shapes:
        return None
    if place.op != "rows":
        return fits(module, shapes[0] if place.op != "transpose" else shapes[0][::-1])  # type: ignore[index, arg-type]
    rows = _running([shape[0] for shape in shapes if shape])
    return module.out in rows and fits(module, (module.out, *shapes[0][1:]))  # type: ignore[index]


def _running(sizes: list[int]) -> list[int]:
    """The sums of the first parts: a fused module may cover only the leading ones (XLabs leaves the MLP out)."""
    return [sum(sizes[: k + 1]) for k in range(1, len(sizes))]


def fits(module: Module, shape: Shape) -> bool:
    """Whether the factors' sizes are those of a weight of ``shape`` (1x1 convolutions and linear layers are alike)."""
    return module.out == shape[0] and (module.inner is None or module.inner == numel(shape[1:]))


def size_of(family: str, component: str, shapes: Mapping[str, Shape | None]) -> str | None:
    """The model of a component whose weights have most of ``shapes`` (canonical path -> shape); None without such a component."""
    sizes = vocabulary.models(family, component)
    if len(sizes) < 2:
        return next(iter(sizes), None)
    best, most = sizes[0], (-1, -1)
    for size in sizes:
        agreement = _agreement(vocabulary.model(size), shapes)
        if agreement > most:
            best, most = size, agreement
        if most == (len(shapes), len(shapes)):
            break  # every name and every shape: the other sizes need not be loaded
    return best


def _agreement(model: vocabulary.Modules, shapes: Mapping[str, Shape | None]) -> tuple[int, int]:
    known = [(model[path].get("weight"), shape) for path, shape in shapes.items() if path in model]
    same = sum(mine is not None and shape is not None and mine[:2] == shape[:2] for mine, shape in known)
    return same, len(known)
