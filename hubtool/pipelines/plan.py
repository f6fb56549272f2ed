"""From low-rank patches to the tensors of PEFT layers, and why others cannot be such layers. Nothing in the pipeline changes here."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hubtool.adapters.low_rank import LowRank
from hubtool.errors import BadValues
from hubtool.pipelines import live
from hubtool.pipelines.targets import Target, shown, weight_shape
from hubtool.tensors.evaluate import compute
from hubtool.types import Shape


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


def obstacles(pipe: Any, targets: list[Target]) -> list[str]:
    """Why these patches cannot be PEFT layers of this pipeline; empty when they can."""
    return list(
        dict.fromkeys(
            [*_of_components(pipe, targets), *_of_kinds(targets), *_of_modules(targets), *_of_magnitudes(targets)]
        )
    )


def plan(targets: list[Target], *, trainable: bool) -> dict[str, list[LayerPlan]]:
    """The layers of each component. ``targets``: without obstacles; ``trainable`` asks for at least fp32.

    Raises ``BadValues`` for NaN and infinity.
    """
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


def _of_components(pipe: Any, targets: list[Target]) -> Iterator[str]:
    holders = live.components(pipe)
    for component in dict.fromkeys(target.component for target in targets):
        if component not in holders:
            yield f"diffusers has no adapter loader for the {component} of a {type(pipe).__name__}"


def _of_kinds(targets: list[Target]) -> Iterator[str]:
    others = Counter(target.patch.algorithm for target in targets if not isinstance(target.patch, LowRank))
    if others:
        listed = ", ".join(f"{name} ({n} modules)" for name, n in others.items())
        yield f"diffusers has no layer for {listed}: it holds low-rank factors only"
    biased = sum(one.bias is not None or one.diff_b is not None for one in _low_rank(targets))
    if biased:
        yield f"{biased} modules also change their bias, which a diffusers adapter cannot"
    sparse = sum(one.residual is not None for one in _low_rank(targets))
    if sparse:
        yield f"{sparse} modules have a sparse residual beside their factors, which PEFT has no place for"


def _of_modules(targets: list[Target]) -> Iterator[str]:
    fused = [str(target) for target in targets if target.op != "rename"]
    if fused:
        yield f"factors of fused weights that the pipeline keeps in parts: {shown(fused)}"
    odd = [target for target in targets if target.op == "rename" and not _holds_layer(target)]
    if odd:
        names = shown(f"{target} ({type(target.modules[0]).__name__})" for target in odd)
        yield f"PEFT has no low-rank layer for {names}"


def _of_magnitudes(targets: list[Target]) -> Iterator[str]:
    modules = Counter(target.component for target in targets)
    directed = [target for target in targets if target.patch.dora_scale is not None]
    for component, n in Counter(target.component for target in directed).items():
        if n != modules[component]:
            yield f"{n} of {modules[component]} modules of {component} have a DoRA magnitude; PEFT wants all or none"
    inputs = [str(one) for one in directed if isinstance(one.patch, LowRank) and one.patch.dora_axis == "in"]
    if inputs:
        yield f"a DoRA magnitude per input, where PEFT has one per output: {shown(inputs)}"


def _low_rank(targets: list[Target]) -> Iterator[LowRank]:
    return (target.patch for target in targets if isinstance(target.patch, LowRank))


def _holds_layer(target: Target) -> bool:
    from torch import nn

    module = target.modules[0]
    plain = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and getattr(module, "groups", 1) == 1
    return plain and target.parameter == "weight"


def _layer(target: Target, trainable: bool) -> LayerPlan:
    patch, module = target.patch, target.modules[0]
    assert isinstance(patch, LowRank)
    shape = weight_shape(module) or ()
    ones = (1,) * (len(shape) - 2)
    alpha = float(patch.rank if patch.alpha_value is None else patch.alpha_value)
    if not math.isfinite(alpha):
        raise BadValues(f"alpha of {target} is {alpha}")
    per_output = (1, shape[0], *ones) if ones else (shape[0],)
    return LayerPlan(
        component=target.component,
        path=target.paths[0],
        up=_ready(target, "up", (shape[0], patch.rank, *ones), trainable),
        down=_ready(target, "down", (patch.rank, *shape[1:]), trainable),
        magnitude=_ready(target, "dora_scale", per_output, trainable),
        rank=patch.rank,
        alpha=alpha,
        rank_stabilised=patch.rank_stabilised,
        scale=patch.scale,
        dtype=patch.up.dtype,
    )


def _ready(target: Target, role: str, shape: Shape, trainable: bool) -> Any:
    """An own, finite copy of a factor in its layer's shape and dtype; None for a role the patch does not have."""
    assert isinstance(target.patch, LowRank)
    source = _value(target.patch, role)
    if source is None:
        return None
    wide = source.to(_dtype(source.dtype, target.modules[0].weight.dtype, trainable))
    if not bool(wide.isfinite().all()):
        raise BadValues(f"{role} of {target} holds NaN or infinity")
    return wide.reshape(shape).clone()


def _value(patch: LowRank, role: str) -> Any:
    """The factor as a tensor. A Tucker core is multiplied into ``down`` (in fp32), which leaves the product as it was."""
    import torch

    expr = getattr(patch, role)
    if role != "down" or patch.mid is None:
        return None if expr is None else compute(expr)
    return torch.einsum("mn...,nj->mj...", compute(patch.mid).float(), compute(expr).float().flatten(1))


def _dtype(source: Any, module: Any, trainable: bool) -> Any:
    """The wider of the factor's and the module's dtype, at least fp32 for training. Never narrower, so that no number is lost."""
    import torch

    # every other float holds all float8 values, and torch promotes float8 to nothing; quantised weights are packed integers
    known = [dtype for dtype in (source, module) if dtype.is_floating_point and dtype.itemsize > 1] or [torch.float32]
    wide = functools.reduce(torch.promote_types, known)
    return torch.promote_types(wide, torch.float32) if trainable else wide
