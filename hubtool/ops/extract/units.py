"""Sorts the parameters of two checkpoints into what is decomposed, what is kept as a difference, and what is left out and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hubtool.layouts import tables, vocabulary
from hubtool.layouts.detect import size_of
from hubtool.layouts.naming import Place
from hubtool.ops.extract.pairing import Pair, Pairs
from hubtool.ops.extract.request import Request
from hubtool.ops.sides import ParameterKey
from hubtool.tensors import expr as e
from hubtool.tensors.dtypes import FLOATS, numel
from hubtool.tensors.expr import Expr
from hubtool.types import Shape

# modules whose weight is a table of vectors: looked up, never multiplied with
_EMBEDDINGS = frozenset({
    "token_embedding", "position_embedding", "embed_tokens", "shared", "relative_attention_bias", "class_embedding", "embeddings",
})  # fmt: skip
_NO_ADAPTER = frozenset({"vae"})


@dataclass(frozen=True, slots=True)
class Unit:
    """What is decomposed as one matrix: a module, or the modules that the target's naming keeps in one weight (their rows in order)."""

    component: str
    parts: tuple[str, ...]
    rows: tuple[int, ...]
    base: Expr
    tuned: Expr

    @property
    def name(self) -> str:
        return f"{self.component}.{'+'.join(self.parts)}"

    @property
    def shape(self) -> Shape:
        return self.base.shape

    @property
    def convolution(self) -> bool:
        return numel(self.shape[2:]) > 1

    @property
    def sizes(self) -> tuple[int, int]:
        return self.shape[0], numel(self.shape[1:])


@dataclass(slots=True)
class Sorted:
    """``units``: to decompose; ``dense``: to keep as a difference; ``left``: reason -> parameters that may have changed and are not asked for."""

    units: list[Unit] = field(default_factory=list)
    dense: dict[ParameterKey, Pair] = field(default_factory=dict)
    left: dict[str, list[ParameterKey]] = field(default_factory=dict)


def sort(pairs: Pairs, request: Request) -> Sorted:
    """Where every common parameter goes."""
    found = Sorted()
    matrices: dict[str, dict[str, Pair]] = {}
    for key, both in pairs.common.items():
        component, parameter = key
        reason = _reason(key, both[0], request)
        if reason:
            found.left.setdefault(reason, []).append(key)
        elif request.kind == "full" or not _matrix(parameter, both[0].shape):
            found.dense[key] = both
        else:
            matrices.setdefault(component, {})[parameter.removesuffix(".weight")] = both
    for component, own in matrices.items():
        found.units += _units(component, own, pairs.family, request.layout)
    return found


def _matrix(parameter: str, shape: Shape) -> bool:
    module = parameter.removesuffix(".weight")
    return parameter.endswith(".weight") and len(shape) >= 2 and module.rpartition(".")[2] not in _EMBEDDINGS


def _reason(key: ParameterKey, tensor: Expr, request: Request) -> str | None:
    """Why a parameter is not extracted; None for one that is."""
    component, parameter = key
    module, _, own = parameter.rpartition(".")
    if component in _NO_ADAPTER:
        return "no adapter format changes this component"
    if tensor.dtype not in FLOATS:
        return "no floating numbers"
    if own not in ("weight", "bias") or not module:
        return "parameters of no module"
    if not request.takes(f"{component}.{module}"):
        return "not asked for (--modules)"
    if _matrix(parameter, tensor.shape):
        return "convolutions (--as locon)" if request.kind == "lora" and numel(tensor.shape[2:]) > 1 else None
    if request.kind == "full" or (request.dense and len(tensor.shape) == 1):
        return None
    return "norms and biases (--dense)" if len(tensor.shape) == 1 else "tables of embeddings (--as full)"


def _units(component: str, own: Mapping[str, Pair], family: str, layout: str) -> Iterator[Unit]:
    places = _places(component, own, family, layout)
    done: set[str] = set()
    for path in own:
        place = places.get(path)
        parts = place.parts if place is not None and _stackable(place, own) else (path,)
        if not done.intersection(parts):
            done.update(parts)
            yield _unit(component, parts, [own[part] for part in parts])


def _places(component: str, own: Mapping[str, Pair], family: str, layout: str) -> Mapping[str, Place]:
    """Where the target's naming keeps each module; empty for namings that keep them as they are."""
    naming = tables.layout(layout, family).naming
    if naming in ("raw", "index", "diffusers"):
        return {}
    size = size_of(family, component, {path: both[0].shape for path, both in own.items()})
    return vocabulary.places(family, naming, component, size)


def _stackable(place: Place, own: Mapping[str, Pair]) -> bool:
    """Whether a fused weight's parts are all there with one input: then they share ``down``, as a trainer on the fused weight would."""
    inputs = {own[part][0].shape[1:] for part in place.parts if part in own}
    return place.op == "rows" and len(inputs) == 1 and all(part in own for part in place.parts)


def _unit(component: str, parts: Sequence[str], both: Iterable[Pair]) -> Unit:
    base, tuned = zip(*both, strict=True)
    rows = tuple(tensor.shape[0] for tensor in base)
    return Unit(component, tuple(parts), rows, _stacked(base), _stacked(tuned))


def _stacked(tensors: Sequence[Expr]) -> Expr:
    """One under another, in one dtype (the wider one where they differ)."""
    dtypes = {tensor.dtype for tensor in tensors}
    same = tensors if len(dtypes) == 1 else [e.Cast(tensor, "F32") for tensor in tensors]
    return e.concat(tuple(same))
