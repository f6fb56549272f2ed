"""From patches to the tensors of PEFT layers: everything that can be refused is refused here, before the pipeline changes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hubtool.adapters.ir import Adapter, ModuleKey, Patch
from hubtool.adapters.low_rank import LowRank
from hubtool.errors import BadValues, LoadMismatch, ShapeMismatch, Unsupported, UsageProblem
from hubtool.pipelines import live
from hubtool.tensors.dtypes import numel
from hubtool.tensors.evaluate import compute
from hubtool.types import Shape

_SHOWN = 5
_COLLAPSE = "hubtool collapse BASE ADAPTER -o OUT puts it into the weights"


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The tensors of one PEFT layer, own copies in the dtype they shall have there.

    ``up`` is (out, rank[, 1 ...]), ``down`` (rank, in[, k ...]), ``magnitude`` (out,) or (1, out, 1 ...). ``path`` is the live
    path; ``dtype`` the safetensors name of the dtype in the source.
    """

    component: str
    path: str
    up: Any
    down: Any
    magnitude: Any
    rank: int
    alpha: float
    rank_stabilised: bool
    scale: float
    dtype: str

    def tensors(self) -> dict[str, Any]:
        """PEFT's name of each parameter inside the layer -> tensor."""
        found = {"lora_A.weight": self.down, "lora_B.weight": self.up, "lora_magnitude_vector.weight": self.magnitude}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


@dataclass(frozen=True, slots=True)
class _Target:
    component: str
    path: str
    module: Any
    patch: LowRank

    def __str__(self) -> str:
        return f"{self.component}.{self.path}"


def plan(pipe: Any, adapter: Adapter, chosen: Collection[str] | None, *, trainable: bool) -> dict[str, list[LayerPlan]]:
    """Work out what each component gets. ``chosen`` limits the components; ``trainable`` asks for at least fp32.

    Raises ``Unsupported`` for kinds that diffusers cannot hold, ``LoadMismatch`` for modules the pipeline does not have and for
    another family, ``ShapeMismatch`` for factors that do not fit each other or their module, ``BadValues`` for NaN and infinity.
    """
    patches = _low_rank(_chosen(adapter, chosen))
    _check_family(pipe, adapter)
    targets = _targets(pipe, adapter, patches)
    _check_shapes(pipe, adapter, targets)
    _check_dora(targets)
    planned: dict[str, list[LayerPlan]] = {}
    for target in targets:
        planned.setdefault(target.component, []).append(_layer(target, trainable))
    return planned


def config(layers: list[LayerPlan]) -> dict[str, Any]:
    """Arguments of PEFT's ``LoraConfig`` that give every module exactly its rank and alpha.

    The commonest rank and alpha are the defaults, the others ``rank_pattern`` and ``alpha_pattern``, by path. PEFT stabilises the
    rank of a whole component or not at all: in a mixed one, alpha becomes what gives the same scale without.
    """
    stabilised = all(one.rank_stabilised for one in layers)
    ranks = {one.path: one.rank for one in layers}
    alphas = {one.path: one.alpha if stabilised or not one.rank_stabilised else one.scale * one.rank for one in layers}
    rank, alpha = Counter((ranks[path], alphas[path]) for path in ranks).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
        "use_dora": layers[0].magnitude is not None,
        "use_rslora": stabilised,
    }


def grouped(patterns: Mapping[str, float]) -> dict[str, float]:
    """The same pattern as one regular expression per distinct value, anchored at both ends.

    PEFT tries every key on every module and its cache of compiled expressions overflows: one key per module costs half a minute on
    SDXL. A bare ``proj_out`` would also match ``blocks.0.proj_out`` (peft pull request 2419).
    """
    paths: dict[float, list[str]] = {}
    for path, value in patterns.items():
        paths.setdefault(value, []).append(path.replace(".", r"\."))
    return {f"^(?:{'|'.join(same)})": value for value, same in paths.items()}


def shown(names: Iterable[str]) -> str:
    """The first few of ``names``, and how many more there are."""
    listed = list(names)
    rest = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _chosen(adapter: Adapter, chosen: Collection[str] | None) -> Mapping[ModuleKey, Patch]:
    if chosen is None:
        return adapter.patches
    unknown = set(chosen) - set(adapter.components())
    if unknown:
        raise UsageProblem(
            f"the adapter has no {', '.join(sorted(unknown))}; it changes {', '.join(adapter.components())}"
        )
    return {key: patch for key, patch in adapter.patches.items() if key[0] in chosen}


def _low_rank(patches: Mapping[ModuleKey, Patch]) -> dict[ModuleKey, LowRank]:
    found = {key: patch for key, patch in patches.items() if isinstance(patch, LowRank)}
    others = Counter(patch.algorithm for key, patch in patches.items() if key not in found)
    if others:
        hint = f"{_COLLAPSE}; hubtool extract makes a lora of the result"
        raise Unsupported(f"diffusers has no layer for {_counted(others)}: it holds low-rank factors only", hint=hint)
    biased = sum(patch.bias is not None or patch.diff_b is not None for patch in found.values())
    if biased:
        raise Unsupported(f"{biased} modules also change their bias, which a diffusers adapter cannot", hint=_COLLAPSE)
    return found


def _counted(names: Counter[str]) -> str:
    return ", ".join(f"{name} ({n} modules)" for name, n in names.items())


def _check_family(pipe: Any, adapter: Adapter) -> None:
    family = live.family_of(pipe)
    if adapter.family and family and adapter.family != family:
        raise LoadMismatch(f"the adapter is for {adapter.family}, this {type(pipe).__name__} is {family}")


def _targets(pipe: Any, adapter: Adapter, patches: Mapping[ModuleKey, LowRank]) -> list[_Target]:
    models = {name: live.component(pipe, name) for name in dict(patches.keys())}
    found, missing = [], []
    for (component, path), patch in patches.items():
        at = live.live_path(models[component], path)
        if at is None:
            missing.append(f"{component}.{path}")
        else:
            found.append(_Target(component, at, live.base(models[component].get_submodule(at)), patch))
    if missing:
        message = f"{len(missing)} of {len(patches)} modules are not in this {type(pipe).__name__}: {shown(missing)}"
        raise LoadMismatch(message, hint=_family_hint(pipe, adapter))
    return found


def _family_hint(pipe: Any, adapter: Adapter) -> str:
    return f"the adapter is for {adapter.family or 'an unknown family'}, the pipeline is {live.family_of(pipe) or 'unknown'}"


def _check_shapes(pipe: Any, adapter: Adapter, targets: Iterable[_Target]) -> None:
    problems = [f"{target}: {problem}" for target in targets if (problem := _misfit(target))]
    if problems:
        raise ShapeMismatch(f"{len(problems)} modules do not fit: {shown(problems)}", hint=_family_hint(pipe, adapter))


def _misfit(target: _Target) -> str | None:
    up, down, mid = target.patch.up.shape, target.patch.down.shape, target.patch.mid
    weight = _weight_shape(target.module)
    if weight is None:
        return f"a {type(target.module).__name__} takes no low-rank factors"
    inner = down[:1] if mid is None else mid.shape[:1]
    if len(up) < 2 or len(down) < 2 or numel(up[2:]) != 1 or up[1:2] != inner or 0 in down:
        return f"ranks differ: up {_times(up)}, down {_times(down)}"
    whole = (up[0], down[1], *(target.patch.kernel or (1,) * len(weight[2:])))
    if whole not in (weight, (*weight, 1, 1)):
        return f"factors are for a weight of {_times(whole)}, the module's is {_times(weight)}"
    return None


def _times(shape: Shape) -> str:
    return " x ".join(map(str, shape))


def _weight_shape(module: Any) -> Shape | None:
    from torch import nn

    plain = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and getattr(module, "groups", 1) == 1
    return tuple(module.weight.shape) if plain else None


def _check_dora(targets: list[_Target]) -> None:
    modules = Counter(target.component for target in targets)
    for component, n in Counter(target.component for target in targets if target.patch.dora_axis).items():
        if n != modules[component]:
            problem = (
                f"{n} of {modules[component]} modules of {component} have a DoRA magnitude; PEFT wants all or none"
            )
            raise Unsupported(problem, hint=_COLLAPSE)
    inputs = [str(target) for target in targets if target.patch.dora_axis == "in"]
    if inputs:
        raise Unsupported(f"a DoRA magnitude per input, where PEFT has one per output: {shown(inputs)}", hint=_COLLAPSE)


def _layer(target: _Target, trainable: bool) -> LayerPlan:
    patch, shape = target.patch, tuple(target.module.weight.shape)
    ones = (1,) * (len(shape) - 2)
    alpha = float(patch.rank if patch.alpha_value is None else patch.alpha_value)
    if not math.isfinite(alpha):
        raise BadValues(f"alpha of {target} is {alpha}")
    per_output = (1, shape[0], *ones) if ones else (shape[0],)
    return LayerPlan(
        component=target.component,
        path=target.path,
        up=_ready(target, "up", (shape[0], patch.rank, *ones), trainable),
        down=_ready(target, "down", (patch.rank, *shape[1:]), trainable),
        magnitude=_ready(target, "dora_scale", per_output, trainable),
        rank=patch.rank,
        alpha=alpha,
        rank_stabilised=patch.rank_stabilised,
        scale=patch.scale,
        dtype=patch.up.dtype,
    )


def _ready(target: _Target, role: str, shape: Shape, trainable: bool) -> Any:
    """An own, finite copy of a factor in its layer's shape and dtype; None for a role the patch does not have."""
    source = _value(target.patch, role)
    if source is None:
        return None
    wide = source.to(_dtype(source.dtype, target.module.weight.dtype, trainable))
    if not bool(wide.isfinite().all()):
        raise BadValues(f"{role} of {target} holds NaN or infinity")
    return wide.reshape(shape).clone()


def _value(patch: LowRank, role: str) -> Any:
    """The factor as a tensor. A Tucker core is multiplied into ``down`` (in fp32), which leaves the product as it was."""
    import torch

    expr = getattr(patch, role)
    if role != "down" or patch.mid is None:
        return None if expr is None else compute(expr)
    return torch.einsum("mnkl,nj->mjkl", compute(patch.mid).float(), compute(expr).float().flatten(1))


def _dtype(source: Any, module: Any, trainable: bool) -> Any:
    """The wider of the factor's and the module's dtype, at least fp32 for training. Never narrower, so that no number is lost."""
    import torch

    # every other float holds all float8 values, and torch promotes float8 to nothing
    wide = module if source.itemsize == 1 else torch.promote_types(source, module)
    return torch.promote_types(wide, torch.float32) if trainable else wide
