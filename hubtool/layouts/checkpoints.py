"""A checkpoint read into components with canonical names, and written back into the names of a single file.

Facts: spec/artefacts.md G, spec/layouts.md 3. Nothing is read but headers; every tensor of the source becomes part of a component, or stays
in ``extras`` under its own name (scheduler buffers, EMA copies, layers that the folder's classes do not have).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hubtool.errors import ConversionError
from hubtool.layouts import checkpoint_tables as tables
from hubtool.layouts.checkpoint_names import Names, Spot
from hubtool.layouts.checkpoint_tables import DIFFUSERS, Component, Form, Pipeline, Slot
from hubtool.layouts.checkpoint_weights import cut, join
from hubtool.layouts.emission import Loss
from hubtool.tensors.expr import Expr
from hubtool.tensors.expr import size as size_of

Weights = Mapping[str, Mapping[str, Expr]]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """``weights``: component -> canonical key -> tensor. ``extras``: the source's own key -> tensor of no component.

    ``strays``: tensors of a folder that no form of the family knows (a safety checker).
    """

    family: str
    weights: Weights
    extras: Mapping[str, Expr]
    strays: Mapping[str, Expr] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Home:
    """Where one tensor of a source belongs."""

    component: str
    spot: Spot


def homes(keys: Iterable[str], pipeline: Pipeline, slots: Iterable[Slot]) -> dict[str, Home]:
    """Source key -> its home, for every key that belongs to a component. The longest prefix decides, then what the component can hold."""
    by_slot: dict[Slot, list[str]] = {slot: [] for slot in sorted(slots, key=lambda slot: -len(slot.prefix))}
    for key in keys:
        slot = next((slot for slot in by_slot if key.startswith(slot.prefix)), None)
        if slot is not None:
            by_slot[slot].append(key)
    found = {key: home for slot, own in by_slot.items() for key, home in _homes_in(slot, own, pipeline)}
    taken: set[tuple[str, str]] = set()
    return {key: found[key] for key in keys if key in found and _first(found[key], taken)}


def _homes_in(slot: Slot, keys: list[str], pipeline: Pipeline) -> Iterator[tuple[str, Home]]:
    component = pipeline.components[slot.component]
    bare = [key.removeprefix(slot.prefix) for key in keys]
    names = Names(tables.rows(pipeline.family, component, slot.naming, reading=True), bare, inward=True)
    heads, modules = tables.heads(pipeline.family, component), tables.modules(component)
    for key, name in zip(keys, bare, strict=True):
        spot = names.spot(name)
        known = not modules or all(part.rpartition(".")[0] in modules for part in spot.parts)
        if known and all(_held(part, heads, component) for part in spot.parts):
            yield key, Home(slot.component, spot)


def _held(key: str, heads: frozenset[str], component: Component) -> bool:
    if heads and key.partition(".")[0] not in heads:
        return False
    return not any(key == name or key.startswith(name + ".") for name in component.unused)


def _first(home: Home, taken: set[tuple[str, str]]) -> bool:
    """Of two tensors that would be the same parameter the first counts; the other stays an extra."""
    own = {(home.component, part) for part in home.spot.parts}
    if own & taken:
        return False
    taken |= own
    return True


def read(tensors: Mapping[str, Expr], pipeline: Pipeline, slots: Iterable[Slot]) -> Checkpoint:
    """Take a source apart. Raises ``ConversionError`` where a tensor cannot be cut as its naming says."""
    placed = homes(tensors, pipeline, slots)
    weights: dict[str, dict[str, Expr]] = {}
    for key, home in placed.items():
        sizes = tables.sizes(pipeline.family, home.component, home.spot.parts) if home.spot.op == "rows" else ()
        parts = cut(home.spot, tensors[key], sizes, _weight_of(key, tensors).shape)
        weights.setdefault(home.component, {}).update(zip(home.spot.parts, parts, strict=True))
    extras = {key: tensor for key, tensor in tensors.items() if key not in placed}
    return Checkpoint(pipeline.family, weights, extras)


def _weight_of(key: str, tensors: Mapping[str, Expr]) -> Expr:
    """The weight beside a bias (``x.bias``, ``x.in_proj_bias``): it says how wide the module is."""
    return tensors.get(f"{key.removesuffix('bias')}weight", tensors[key])


@dataclass(frozen=True, slots=True)
class Single:
    """What a single file will hold. ``losses``: components it has no place for."""

    tensors: Mapping[str, Expr]
    losses: tuple[Loss, ...]


def write(checkpoint: Checkpoint, pipeline: Pipeline, form: Form) -> Single:
    """The tensors of a single file of ``form``, extras last. Raises ``ConversionError`` where parts of a fused tensor are missing."""
    tensors: dict[str, Expr] = {}
    for slot in form.slots:
        if slot.component in checkpoint.weights:
            tensors.update(_named(checkpoint.weights[slot.component], pipeline, slot))
    held = form.components()
    losses = (_homeless(name, own, form) for name, own in checkpoint.weights.items() if name not in held)
    extras = {key: tensor for key, tensor in checkpoint.extras.items() if key not in tensors}
    return Single({**tensors, **extras}, tuple(losses))


def stray_losses(checkpoint: Checkpoint) -> Iterator[Loss]:
    """What a folder holds beside the components of its family, one loss for each of its folders."""
    folders: dict[str, list[Expr]] = {}
    for key, tensor in checkpoint.strays.items():
        folders.setdefault(key.partition("/")[0], []).append(tensor)
    for name, tensors in folders.items():
        yield Loss(f"{name} ({counted(tensors)})", f"no known part of a {checkpoint.family} pipeline")


def _homeless(component: str, tensors: Mapping[str, Expr], form: Form) -> Loss:
    return Loss(f"{component} ({counted([*tensors.values()])})", f"a single file of form {form.id} has no place for it")


def counted(tensors: Sequence[Expr]) -> str:
    """``1 tensor, 12 bytes``."""
    noun = "tensor" if len(tensors) == 1 else "tensors"
    return f"{len(tensors)} {noun}, {sum(map(size_of, tensors))} bytes"


def _named(weights: Mapping[str, Expr], pipeline: Pipeline, slot: Slot) -> Iterator[tuple[str, Expr]]:
    component = pipeline.components[slot.component]
    names = Names(tables.rows(pipeline.family, component, slot.naming, reading=False), weights, inward=False)
    done: set[str] = set()
    for key in weights:
        spot = names.spot(key)
        if spot.key not in done:
            done.add(spot.key)
            yield slot.prefix + spot.key, join(spot, _parts(spot, weights))


def _parts(spot: Spot, weights: Mapping[str, Expr]) -> list[Expr]:
    missing = [part for part in spot.parts if part not in weights]
    if missing:
        raise ConversionError(f"{spot.key} is one tensor of {len(spot.parts)} parts, and {missing[0]} is missing")
    return [weights[part] for part in spot.parts]


def folder_slots(pipeline: Pipeline) -> tuple[Slot, ...]:
    """The slots of a diffusers folder: tensors are called ``component/key``."""
    return tuple(Slot(f"{name}/", name, DIFFUSERS) for name in pipeline.components)


def single_slots(pipeline: Pipeline, prefix: str, component: str, naming: str) -> tuple[Slot, ...]:
    """The slots to read a single file with: its denoiser lies behind ``prefix``, everything else where any form of the family has it."""
    others = {slot.prefix: slot for form in pipeline.forms for slot in form.slots if slot.component != component}
    return (Slot(prefix, component, naming), *others.values())
