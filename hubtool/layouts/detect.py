"""Which family a set of modules belongs to: names first, then shapes. Ambiguity is reported as a set, never guessed away."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hubtool.layouts import tables
from hubtool.layouts.vocabulary import spellings, vocabulary
from hubtool.tensors.dtypes import numel
from hubtool.types import Shape


@dataclass(frozen=True, slots=True)
class Module:
    """A module as a file spells it. ``sizes``: (out, in * kh * kw) as far as the factors tell; None where they do not."""

    components: tuple[str, ...]
    stem: str
    out: int | None = None
    inner: int | None = None


@dataclass(frozen=True, slots=True)
class Match:
    """How one family explains the modules. ``found``: stem -> (component, naming, canonical path)."""

    family: str
    found: Mapping[tuple[tuple[str, ...], str], tuple[str, str, str]]
    contradictions: tuple[str, ...]
    checked: int

    @property
    def score(self) -> tuple[int, int]:
        return (len(self.found), -len(self.contradictions))


def match(modules: Iterable[Module], joiner: str, family: str | None = None) -> tuple[Match, ...]:
    """Matches of the best families: most names found, then fewest shape contradictions. Several when the file cannot tell.

    With ``family`` only that one is tried.
    """
    listed = tuple(modules)
    names = tables.family_ids() if family is None else (tables.family(family).id,)
    every = [one for one in (_match(name, listed, joiner) for name in names) if one.found]
    if not every:
        return ()
    best = max(one.score for one in every)
    return tuple(one for one in every if one.score == best)


def _match(name: str, modules: tuple[Module, ...], joiner: str) -> Match:
    found: dict[tuple[tuple[str, ...], str], tuple[str, str, str]] = {}
    wrong: list[str] = []
    checked = 0
    for module in modules:
        hit = look_up(name, module, joiner)
        if hit is None:
            continue
        found[module.components, module.stem] = hit
        shape = vocabulary(name).weight_shape(hit[0], hit[2])
        if module.out is not None and shape is not None:
            checked += 1
            if not fits(module, shape):
                wrong.append(hit[2])
    return Match(name, found, tuple(wrong), checked)


def look_up(name: str, module: Module, joiner: str) -> tuple[str, str, str] | None:
    """(component, naming, canonical path) of a spelled module in one family. ``"*"`` tries every component."""
    known = vocabulary(name).modules
    components = known if module.components == ("*",) else [c for c in module.components if c in known]
    for component in components:
        hit = spellings(name, component, joiner).get(module.stem)
        if hit is not None:
            return component, *hit
    return None


def fits(module: Module, shape: Shape) -> bool:
    """Whether the factors' sizes are those of a weight of ``shape`` (1x1 convolutions and linear layers are alike)."""
    return module.out == shape[0] and (module.inner is None or module.inner == numel(shape[1:]))
