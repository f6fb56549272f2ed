"""What generate works on: bases and adapters found by path, reference, repository or a picture's recipe, and checked against each other."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hubtool.actions.generate_settings import ALONE, TOKENS, Settings, asked, check_named, kept, of_part, settled
from hubtool.actions.late_hashes import LARGE
from hubtool.actions.recipe import RunOptions, fingerprint, resolve
from hubtool.actions.refs import locate
from hubtool.errors import BadValues, LoadMismatch, Unsupported, UsageProblem
from hubtool.formats import open_file
from hubtool.layouts.identify import identify
from hubtool.ops.recipe import Input
from hubtool.pipelines import base_families, kinds
from hubtool.pipelines.curves import curve
from hubtool.pipelines.families import family_of
from hubtool.pipelines.kinds.textual_inversion import partner
from hubtool.pipelines.pictures import Part, Recipe

Refs = Mapping[Any, float] | Sequence[str | Path | tuple[str | Path, float]]
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Chosen:
    """An adapter and where it is. ``fixed``: of a kind that has no strength. ``settings``: as for ``hubtool.load``."""

    part: Part
    path: Path
    fixed: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ready:
    """``source``: the path or repository of the base; ``pipe``: the base, where it is open already."""

    base: Part
    source: str | Path
    adapters: tuple[Chosen, ...]
    negatives: tuple[Chosen, ...] = ()
    pipe: Any = None

    @property
    def all(self) -> tuple[Chosen, ...]:
        return (*self.adapters, *self.negatives)

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(one.part for one in self.all)

    @property
    def variable(self) -> tuple[Chosen, ...]:
        return tuple(one for one in self.adapters if not one.fixed)

    @property
    def fixed(self) -> tuple[Chosen, ...]:
        return tuple(one for one in self.adapters if one.fixed)


def ready(
    base: Any, adapters: Refs, negatives: Sequence[str | Path] = (), *, settings: Settings | None = None,
    library: str | None = None, hashes: bool = False,
) -> Ready:  # fmt: skip
    """Find base and adapters; reads headers and hashes, loads nothing.

    ``settings``: reference, or name of an adapter's file with or without suffix -> what its kind has to be set (``generate_settings``).
    Raises ``LoadMismatch`` for an adapter of another family, ``Unsupported`` for files that are no base or no adapter, ``UsageProblem``
    and ``BadValues`` for settings, and what finding them raises.
    """
    settings = settings or {}
    source, part, families = _base(base, library, hashes)
    given = pairs(adapters)
    chosen = tuple(_adapter(ref, strength, families, library, settings) for ref, strength in given)
    dark = tuple(_negative(_adapter(ref, 1.0, families, library, settings)) for ref in negatives)
    refs = (*(ref for ref, _ in given), *negatives)
    check_named(settings, zip(refs, (one.part.name for one in (*chosen, *dark)), strict=True))
    chosen, dark = _paired(chosen, dark, families)
    return Ready(part, source, chosen, dark, None if isinstance(base, str | Path) else base)


def pairs(adapters: Refs) -> list[tuple[str | Path, float]]:
    """(reference, strength) of every adapter."""
    given: Sequence[Any] = list(adapters.items()) if isinstance(adapters, Mapping) else adapters
    if isinstance(given, str):
        raise UsageProblem("adapters are a list or a mapping, not one string", hint=f"[{given!r}]")
    return [(one[0], float(one[1])) if isinstance(one, tuple) else (one, 1.0) for one in given]


def named(text: str) -> tuple[str, float]:
    """``ADAPTER[=STRENGTH]``. A file whose own name ends in ``=number`` is that file."""
    path, equals, number = text.rpartition("=")
    if not equals or os.path.lexists(text):
        return text, 1.0
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise UsageProblem(f"{number!r} is no strength", hint=f"{path}=0.8")
    return path, strength


def of_recipe(
    recipe: Recipe, search: Sequence[Path], library: str | None
) -> tuple[str, list[tuple[str, float]], list[str], dict[str, dict[str, Any]]]:
    """(base, adapters, negative embeddings, settings) of a picture, found by name and hash. Raises ``NotFound``."""
    options = RunOptions(search=tuple(search), library=library)
    repository = recipe.base.sha256 is None and _REPOSITORY.fullmatch(recipe.base.name)
    base = recipe.base.name if repository else _found(recipe.base, options)
    parts = [(_found(one, options), one) for one in recipe.adapters]
    return (
        base,
        [(path, one.strength) for path, one in parts if not one.negative],
        [path for path, one in parts if one.negative],
        {path: dict(of_part(one, options)) for path, one in parts},
    )


def with_schedules(found: Ready, schedules: Mapping[str, str]) -> Ready:
    """``found`` with schedules for adapters that are named as their files, with or without suffix. Raises ``UsageProblem``."""
    left = dict(schedules)
    adapters = []
    for one in found.adapters:
        text = left.pop(one.part.name, None) or left.pop(Path(one.part.name).stem, None)
        if text is not None and one.fixed:
            raise UsageProblem(f"{one.part.name} has no strength that could change")
        adapters.append(one if text is None else replace(one, part=replace(one.part, schedule=text)))
        if text is not None:
            curve(text)
    if left:
        raise UsageProblem(f"no adapter is called {next(iter(left))!r}", hint=f"{[one.part.name for one in adapters]}")
    return replace(found, adapters=tuple(adapters))


def _found(part: Part, options: RunOptions) -> str:
    return str(resolve(Input(name=Path(part.name).name, sha256=part.sha256), options))


def _base(base: Any, library: str | None, hashes: bool) -> tuple[str | Path, Part, tuple[str, ...]]:
    """(path or repository, how the recipe calls it, the families it may be of)."""
    if not isinstance(base, str | Path):
        name = str(getattr(base, "name_or_path", None) or type(base).__name__)
        return "", *_called(Path(name).name if Path(name).is_absolute() else name, None, family_of(base))
    if not os.path.lexists(base) and _REPOSITORY.fullmatch(str(base)):
        return str(base), *_called(str(base), None, *base_families.families(str(base)))
    path = locate(base, library)
    families = base_families.families(path)
    known = fingerprint(path) if hashes or _size(path) <= LARGE else None
    return path, *_called(path.resolve().name, known, *families)


def _called(name: str, sha256: str | None, *families: str | None) -> tuple[Part, tuple[str, ...]]:
    known = tuple(family for family in families if family)
    return Part(name, sha256, known[0] if len(known) == 1 else None), known


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in open_file(path).files)


def _adapter(
    ref: str | Path, strength: float, families: tuple[str, ...], library: str | None, settings: Settings
) -> Chosen:
    if not math.isfinite(strength):
        raise BadValues(f"a strength of {strength} is no number")
    path = locate(ref, library)
    found = identify(open_file(path))
    kind = kinds.find(found.kind)
    if kind is None:
        raise Unsupported(f"a file of kind {found.kind} is no adapter", path=path, hint=f"hubtool inspect {path}")
    fits = (found.family,) if found.family else found.family_candidates
    if found.kind != TOKENS and families and fits and not {*families} & {*fits}:
        raise LoadMismatch(f"the adapter is for {' or '.join(fits)}, the base is {' or '.join(families)}", path=path)
    name = path.resolve().name
    own = settled(found.kind, path, asked(settings, ref, name), library)
    part = Part(name, fingerprint(path), found.family, found.kind, strength, settings=kept(found.kind, own))
    return Chosen(part, path, not kind.STRENGTH, own)


def _paired(
    chosen: tuple[Chosen, ...], dark: tuple[Chosen, ...], families: tuple[str, ...]
) -> tuple[tuple[Chosen, ...], tuple[Chosen, ...]]:
    """The negative halves of DreamArtist pairs among the negative embeddings; each half is loaded alone."""
    whole = [one.path for one in chosen if one.part.kind == TOKENS and one.settings["pair"]]
    halves = dict.fromkeys(other for path in whole if (other := partner(path)) is not None)
    named = {one.part.sha256 for one in (*chosen, *dark)}
    added = [_negative(_adapter(other, 1.0, families, None, {})) for other in halves]
    dark = (*dark, *(one for one in added if one.part.sha256 not in named))
    return tuple(map(_alone, chosen)), tuple(map(_alone, dark))


def _alone(chosen: Chosen) -> Chosen:
    return replace(chosen, settings=ALONE) if chosen.part.kind == TOKENS else chosen


def _negative(chosen: Chosen) -> Chosen:
    return replace(chosen, part=replace(chosen.part, negative=True))
