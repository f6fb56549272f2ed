"""Files without names: cloneofsimo's safeloras (``unet:3:up``) and ``.pt`` lists. The position in a walk over the module tree is the name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hubtool.layouts import tables
from hubtool.layouts.detect import fits
from hubtool.layouts.modules import Draft
from hubtool.layouts.tables import Syntax, Walk
from hubtool.layouts.vocabulary import weight_shape
from hubtool.tensors.expr import Read
from hubtool.tensors.ref import TensorRef

_KEY = re.compile(r"(\w+):(\d{1,6}):(up|down)")


@dataclass(frozen=True, slots=True)
class Placed:
    """Positions turned into names. ``walk`` is None where no table fits; then the paths are the positions themselves."""

    syntax: Syntax
    drafts: Mapping[tuple[str, str], Draft]
    families: tuple[str, ...]
    others: tuple[str, ...]
    unplaced: tuple[str, ...]


def read(structure: object, tensors: Mapping[str, TensorRef]) -> Placed | None:
    """Recognise a positional file (``structure``: a pickle's top object); None when it is not one."""
    if isinstance(structure, list):
        pairs = _pairs(tensors)
        return None if pairs is None else _place(tables.syntaxes()["cloneofsimo-list"], {"": pairs}, ())
    grouped, others = _indexed(tensors)
    return _place(tables.syntaxes()["cloneofsimo"], grouped, tuple(others)) if grouped else None


def _pairs(tensors: Mapping[str, TensorRef]) -> list[Draft] | None:
    """up0, down0, up1, down1 ...: every up's columns are the next down's rows."""
    refs = list(tensors.values())
    if len(refs) < 2 or len(refs) % 2 or list(tensors) != [str(i) for i in range(len(refs))]:
        return None
    drafts = []
    for i, (up, down) in enumerate(zip(refs[::2], refs[1::2], strict=True)):
        if len(up.shape) not in (2, 4) or len(up.shape) != len(down.shape) or up.shape[1] != down.shape[0]:
            return None
        drafts.append(Draft(("*",), str(i), {"up": Read(up), "down": Read(down)}, {"up": up.name, "down": down.name}))
    return drafts


def _indexed(tensors: Mapping[str, TensorRef]) -> tuple[dict[str, list[Draft]], list[str]]:
    """component -> modules by index. Empty unless every two-dimensional key is an indexed one and the indices have no gap."""
    found: dict[str, dict[int, Draft]] = {}
    others = []
    for key, ref in tensors.items():
        hit = _KEY.fullmatch(key)
        if hit is None:
            others.append(key)
            continue
        draft = found.setdefault(hit[1], {}).setdefault(int(hit[2]), Draft((hit[1],), hit[2]))
        draft.tensors[hit[3]] = Read(ref)
        draft.keys[hit[3]] = key
    if any(sorted(modules) != list(range(len(modules))) for modules in found.values()):
        return {}, others
    return {component: [modules[i] for i in range(len(modules))] for component, modules in found.items()}, others


def _place(syntax: Syntax, grouped: Mapping[str, list[Draft]], others: tuple[str, ...]) -> Placed:
    drafts: dict[tuple[str, str], Draft] = {}
    families: set[str] | None = None
    unplaced = []
    for component, modules in grouped.items():
        fitting = [(walk, name) for walk in syntax.walks for name in _families(walk, component, modules)]
        if not fitting:
            unplaced += [f"{component}:{draft.stem}" for draft in modules]
            drafts |= {(component or "model", draft.stem): draft for draft in modules}
            continue
        names = {name for _, name in fitting}
        families = names if families is None else families & names
        walk = fitting[0][0]
        drafts |= {(walk.component, path): draft for path, draft in zip(walk.paths, modules, strict=True)}
    return Placed(syntax, drafts, tuple(sorted(families or ())), others, tuple(unplaced))


def _families(walk: Walk, component: str, modules: list[Draft]) -> Iterator[str]:
    """Families whose module shapes agree with every position of the walk."""
    if component not in ("", walk.component) or len(modules) != len(walk.paths):
        return
    for name in walk.families:
        shapes = [weight_shape(name, walk.component, path) for path in walk.paths]
        if all(shape and fits(draft.module(), shape) for shape, draft in zip(shapes, modules, strict=True)):
            yield name


def walk_for(syntax: Syntax, component: str, family: str, paths: frozenset[str]) -> Walk | None:
    """The walk that holds exactly ``paths``: positions cannot leave a module out."""
    for walk in syntax.walks:
        if walk.component == component and family in walk.families and frozenset(walk.paths) == paths:
            return walk
    return None
