"""From targets to shares of the weights: what can be refused is refused here, before a weight changes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from hubtool.adapters.ir import Patch
from hubtool.errors import BadValues, Unsupported
from hubtool.pipelines import live, weights
from hubtool.pipelines.targets import Target, shown
from hubtool.pipelines.weights import Share
from hubtool.tensors.evaluate import compute, to_bytes
from hubtool.tensors.expr import Expr, Literal

Shares = dict[str, list[Share]]
_BIAS_ROLES = frozenset({"alpha", "diff_b", "b_norm"})
_PLAIN = frozenset({"torch.float16", "torch.bfloat16", "torch.float32", "torch.float64"})


def plan_shares(targets: list[Target], strength: float) -> Shares:
    """The shares of each component, their factors read into memory: a file may be gone when the next adapter is unloaded.

    Raises ``Unsupported`` for weights that are quantised or not in memory, ``BadValues`` for NaN and infinity.
    """
    _check_plain(targets)
    planned: Shares = {}
    for target in targets:
        planned.setdefault(target.component, []).append(_share(target, strength))
    return planned


def load_shares(pipe: Any, shares: Shares, name: str) -> None:
    """Put all shares into the weights, or none."""
    done: list[str] = []
    try:
        for component, own in shares.items():
            weights.add(live.modules(pipe)[component], name, own)
            done.append(component)
    except BaseException:
        for component in done:
            weights.remove(live.modules(pipe)[component], name)
        raise


def unload_shares(pipe: Any, name: str) -> None:
    """Take adapter ``name`` out of the weights of every component."""
    for model in live.modules(pipe).values():
        if name in weights.adapters(model):
            weights.remove(model, name)


def collapsed(pipe: Any) -> set[str]:
    """Names of the adapters inside the weights of any component."""
    return {name for model in live.modules(pipe).values() for name in weights.adapters(model)}


def patches_of(pipe: Any, name: str) -> dict[tuple[str, str], Patch]:
    """The patches of adapter ``name`` as they were loaded, by live component and canonical path."""
    found: dict[tuple[str, str], Patch] = {}
    for component, model in live.modules(pipe).items():
        for share in weights.ledger(model).shares.get(name, ()):
            found[component, share.source[1]] = share.patch
    return found


def _check_plain(targets: Iterable[Target]) -> None:
    problems = [f"{target}: {problem}" for target in targets if (problem := _hindrance(target))]
    if problems:
        hint = "load the adapter before quantising, casting or offloading the weights"
        raise Unsupported(f"{len(problems)} weights cannot take an adapter in: {shown(problems)}", hint=hint)


def _hindrance(target: Target) -> str | None:
    for module in target.modules:
        parameter = getattr(module, target.parameter)
        kind, dtype = type(parameter).__name__, str(parameter.dtype)
        if kind != "Parameter" or dtype not in _PLAIN:
            return f"its weight is quantised ({kind}, {dtype.removeprefix('torch.')})"
        if parameter.is_meta:
            return "its weight is not in memory (sequential offload)"
    return None


def _share(target: Target, strength: float) -> Share:
    patch = _held(target)
    bias_only = {role for role, _ in patch.roles()} <= _BIAS_ROLES
    return Share(
        source=target.key,
        patch=patch,
        strength=1.0 if patch.algorithm == "set" else strength,  # a replaced weight is what it is
        parts=() if bias_only else tuple((path, target.parameter) for path in target.paths),
        op=target.op,
        biases=_biases(target, patch),
    )


def _biases(target: Target, patch: Patch) -> tuple[tuple[str, str], ...]:
    """The bias, where the patch changes it; a module without one gets it only for a change that is not zero."""
    import torch

    module = target.modules[0]
    own = [getattr(one, "bias", None) for one in target.modules]
    known = torch.zeros(_rows(target)) if own[0] is None or len(own) > 1 else own[0].detach().float().cpu()
    change = patch.bias_delta(known)
    if change is None or (own[0] is None and not bool(change.any())):
        return ()
    if target.op != "rename":
        raise Unsupported(f"{target}: the bias of a fused weight that the pipeline keeps in parts")
    if not hasattr(module, "bias"):
        raise Unsupported(f"{target}: a {type(module).__name__} cannot have a bias")
    return ((target.paths[0], "bias"),)


def _rows(target: Target) -> int:
    return sum(getattr(module, target.parameter).shape[0] for module in target.modules)


def _held(target: Target) -> Patch:
    """The patch with its tensors in memory, finite."""
    patch = target.patch
    patch.check(str(target))
    if patch.alpha_value is not None and not math.isfinite(patch.alpha_value):
        raise BadValues(f"alpha of {target} is {patch.alpha_value}")
    held = _in_memory(patch)
    for role, tensor in held.roles():
        if not _finite(tensor):
            raise BadValues(f"{role} of {target} holds NaN or infinity")
    return held


def _in_memory(patch: Any) -> Any:
    """``patch`` with every expression replaced by its bytes: patches are dataclasses of expressions, or of mappings of them."""
    values = {one.name: getattr(patch, one.name) for one in dataclasses.fields(patch)}
    return dataclasses.replace(patch, **{name: _literal(value) for name, value in values.items()})


def _literal(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _literal(one) for key, one in value.items()}
    return Literal(to_bytes(value), value.dtype, value.shape) if isinstance(value, Expr) else value


def _finite(tensor: Expr) -> bool:
    value = compute(tensor)
    return not value.is_floating_point() or bool(value.float().isfinite().all())
