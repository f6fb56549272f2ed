"""From a patch's name to the parameters of a live component: one module, one bare parameter, or the parts of a fused weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hubtool.adapters.ir import Adapter, ModuleKey, Patch
from hubtool.adapters.low_rank import LowRank
from hubtool.adapters.weight_ops import SwapHalves, TakeRows, Transpose, WeightOp
from hubtool.errors import LoadMismatch, ShapeMismatch, Unsupported
from hubtool.layouts import tables, vocabulary
from hubtool.pipelines import live
from hubtool.pipelines.families import family_of
from hubtool.tensors.dtypes import numel
from hubtool.types import Shape

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Target:
    """What one patch changes. ``key``: the patch's own name. ``paths`` and ``modules``: live, several where the patch is for a fused
    weight that the pipeline keeps in parts. ``op``: from the live weights to the weight the patch knows, as in the naming tables.
    """

    key: ModuleKey
    paths: tuple[str, ...]
    modules: tuple[Any, ...]
    patch: Patch
    op: str = "rename"
    parameter: str = "weight"

    @property
    def component(self) -> str:
        return self.key[0]

    def __str__(self) -> str:
        return f"{self.component}.{self.paths[0] if len(self.paths) == 1 else self.key[1]}"


def find(pipe: Any, adapter: Adapter, patches: Mapping[ModuleKey, Patch]) -> list[Target]:
    """Where every patch goes. Raises ``LoadMismatch`` with those that have no place in this pipeline."""
    models = _models(pipe, dict(patches.keys()))
    found = {key: _target(pipe, models[key[0]], key, patch, adapter.family) for key, patch in patches.items()}
    missing = [".".join(key) for key, target in found.items() if target is None]
    if missing:
        message = f"{len(missing)} of {len(patches)} modules are not in this {type(pipe).__name__}: {shown(missing)}"
        raise LoadMismatch(message, hint=_hint(pipe, adapter))
    targets = [target for target in found.values() if target is not None]
    _check_shapes(pipe, adapter, targets)
    parts = [part for target in targets for part in _cut(target)]
    _check_apart(parts)
    return parts


def _models(pipe: Any, names: Iterable[str]) -> dict[str, Any]:
    models, wanted = live.modules(pipe), list(names)
    absent = [name for name in wanted if name not in models]
    if absent:
        present = [name for name in wanted if name in models]
        others = [name for name in models if name not in wanted]
        hint = (
            f"load a part of it: components={present}"
            if present
            else f"load it into={{{absent[0]!r}: one of {others}}}"
        )
        raise LoadMismatch(
            f"the adapter changes {', '.join(absent)}, which this {type(pipe).__name__} does not have", hint=hint
        )
    return models


def shown(names: Iterable[str]) -> str:
    """The first few of ``names``, and how many more there are."""
    listed = list(names)
    rest = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def weight_shape(module: Any, parameter: str = "weight") -> Shape | None:
    """Shape of a module's parameter as the module uses it: a quantised linear layer packs its numbers otherwise. None without one."""
    from torch import nn

    if isinstance(module, nn.Linear) and parameter == "weight":
        return (module.out_features, module.in_features)
    tensor = getattr(module, parameter, None)
    return None if tensor is None else tuple(tensor.shape)


def _target(pipe: Any, model: Any, key: ModuleKey, patch: Patch, family: str | None) -> Target | None:
    at = live.live_path(model, key[1])
    if at is not None:
        return _at(model, key, patch, (at,))
    owner, _, leaf = key[1].rpartition(".")
    above = live.live_path(model, owner) if owner else ""
    if above is not None and leaf in live.base(model.get_submodule(above))._parameters:
        return _at(model, key, patch, (above,), parameter=leaf)
    return _elsewhere(model, key, patch, family or family_of(pipe))


def _at(model: Any, key: ModuleKey, patch: Patch, paths: tuple[str, ...], **how: str) -> Target:
    return Target(key, paths, tuple(live.base(model.get_submodule(path)) for path in paths), patch, **how)


def _elsewhere(model: Any, key: ModuleKey, patch: Patch, family: str | None) -> Target | None:
    """A patch that kept the outside name of a fused weight because it could not be cut."""
    if family not in tables.family_ids():
        return None
    for size in vocabulary.models(family, key[0]):
        place = vocabulary.spellings(family, key[0], ".", size).get(key[1])
        paths = [live.live_path(model, part) for part in place.parts] if place else []
        if place and None not in paths:
            return _at(model, key, patch, tuple(path for path in paths if path is not None), op=place.op)
    return None


def _check_apart(targets: list[Target]) -> None:
    """A fused weight and one of its parts in the same adapter: which of them counts would differ from tool to tool."""
    times = Counter((one.component, path, one.parameter) for one in targets for path in one.paths)
    twice = [f"{component}.{path}" for (component, path, _), n in times.items() if n > 1]
    if twice:
        raise LoadMismatch(f"{len(twice)} modules are changed twice by this adapter: {shown(twice)}")


def _cut(target: Target) -> list[Target]:
    """One target for each live module, where the patch can follow; the live modules' own sizes decide, not those of a table."""
    try:
        return [_alone(target, path, op) for path, op in _ways(target)] if target.op != "rename" else [target]
    except Unsupported:
        return [target]


def _ways(target: Target) -> Iterator[tuple[int, WeightOp]]:
    """Index of each live module, and what makes its weight of the one that the patch knows."""
    if target.op != "rows":
        yield 0, SwapHalves() if target.op == "swap_halves" else Transpose()
        return
    start = 0
    for i, module in enumerate(target.modules):
        rows = (weight_shape(module, target.parameter) or (0,))[0]
        yield i, TakeRows(start, start + rows)
        start += rows


def _alone(target: Target, index: int, op: WeightOp) -> Target:
    path, module = target.paths[index], target.modules[index]
    key = (target.component, live.canonical_path(target.component, path))
    return Target(key, (path,), (module,), target.patch.under(op), parameter=target.parameter)


def _check_shapes(pipe: Any, adapter: Adapter, targets: Iterable[Target]) -> None:
    problems = [f"{target}: {problem}" for target in targets if (problem := _misfit(target))]
    if problems:
        raise ShapeMismatch(f"{len(problems)} modules do not fit: {shown(problems)}", hint=_hint(pipe, adapter))


def _hint(pipe: Any, adapter: Adapter) -> str:
    return f"the adapter is for {adapter.family or 'an unknown family'}, the pipeline is {family_of(pipe) or 'unknown'}"


def _misfit(target: Target) -> str | None:
    shapes = [weight_shape(module, target.parameter) for module in target.modules]
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes):
        return f"a {type(target.modules[0]).__name__} has no {target.parameter}"
    if isinstance(target.patch, LowRank) and (problem := _ranks_differ(target.patch)):
        return problem
    live_shape, own = _whole(known, target.op), target.patch.weight_shape
    if own is None or _bare(own) == _bare(live_shape) or own == (live_shape[0], numel(live_shape[1:])):
        return None
    return f"factors are for a weight of {_times(own)}, the module's is {_times(live_shape)}"


def _ranks_differ(patch: LowRank) -> str | None:
    up, down, mid = patch.up.shape, patch.down.shape, patch.mid
    inner = down[:1] if mid is None else mid.shape[:1]
    if len(up) < 2 or len(down) < 2 or numel(up[2:]) != 1 or up[1:2] != inner or 0 in down:
        return f"ranks differ: up {_times(up)}, down {_times(down)}"
    return None


def _whole(shapes: list[Shape], op: str) -> Shape:
    """Shape of the weight that the patch knows."""
    if op == "transpose":
        return (*reversed(shapes[0][:2]), *shapes[0][2:])
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _bare(shape: Shape) -> Shape:
    """Without the kernel of a 1x1 convolution, which a linear layer does not have."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _times(shape: Shape) -> str:
    return " x ".join(map(str, shape))
