"""Plans a conversion: container, layout, algorithm, repair, dtype. Decides only; nothing is written here."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hubtool.errors import BadValues, ConversionError, UsageProblem
from hubtool.formats.base import TensorFile
from hubtool.layouts.parse import Parsed, recognise
from hubtool.ops.containers import container
from hubtool.ops.plan import Plan
from hubtool.ops.target import DTYPES, ORIGIN, Target
from hubtool.tensors.dtypes import FLOATS
from hubtool.tensors.expr import Compute, Expr

if TYPE_CHECKING:
    from hubtool.adapters.identity import Identity

_WHOLE_MODELS = frozenset({"checkpoint", "diffusers_pipeline", "vae", "text_encoder"})


def plan(file: TensorFile, target: Target) -> Plan:
    """What converting ``file`` to ``target`` will write. Raises ``ConversionError`` and its kin where that is impossible."""
    if target.repair:
        from hubtool.ops import repairing

        return repairing.plan(file, replace(target, repair=False), plan)
    parsed = recognise(file, target.family)
    adapter = parsed is not None and parsed.adapter.patches
    made = _adapter(file, parsed, target) if parsed and adapter else _other(file, target)
    return _cast(made, target.dtype) if target.dtype else made


def _adapter(file: TensorFile, parsed: Parsed, target: Target) -> Plan:
    from hubtool.ops import adapters

    if target.layout == ORIGIN:
        from hubtool.ops import repairing

        return repairing.back(file, parsed, target, plan)
    if target.algorithm is None and target.component is None and adapters.keeps_layout(parsed, target):
        return container(file, target.format, parsed)
    return adapters.plan(file, parsed, target)


def _other(file: TensorFile, target: Target) -> Plan:
    """Whatever is no adapter: artefacts and whole models have conversions of their own, everything else can change its container."""
    from hubtool.layouts.identify import identify

    if target.algorithm is not None:
        raise UsageProblem("only an adapter can be rewritten as another algorithm", path=file.path)
    identity = identify(file)
    made = _artefact(file, identity, target)
    if made is not None:
        return made
    if target.layout is not None or target.component is not None:
        raise _no_layout(file, identity, target)
    return container(file, target.format, None)


def _no_layout(file: TensorFile, identity: Identity, target: Target) -> ConversionError:
    """Why a file of this kind cannot be given a layout, and what to do about it."""
    if any(finding.code == "broken-keys" for finding in identity.findings):
        text = "the keys of this adapter were broken by hand"
        return ConversionError(text, path=file.path, hint="mend them in the same step with --repair")
    if identity.kind == "text_encoder":
        named = f"of {target.family}" if target.family else "that hubtool knows"
        text = f"no pipeline {named} has this text encoder ({identity.variant})"
        return ConversionError(text, path=file.path, hint="without --layout its container can be changed")
    text = f"this {identity.kind} has no layout {target.layout or target.component!r}"
    text = (
        text if identity.kind != "unknown" else "neither an adapter layout nor an embedding encoding explains this file"
    )
    return ConversionError(text, path=file.path, hint=f"hubtool explain {file.path}")


def _artefact(file: TensorFile, identity: Identity, target: Target) -> Plan | None:
    if identity.kind in _WHOLE_MODELS:
        from hubtool.ops import checkpoints

        return checkpoints.plan(file, target, config_from=target.config_from)
    from hubtool.ops import artefacts

    return artefacts.plan(file, identity, target)


def _cast(made: Plan, dtype: str) -> Plan:
    """Round every floating tensor but the alphas once to ``dtype``; a value that overflows is refused when it is met."""
    name = DTYPES.get(dtype.lower(), dtype.upper())
    if name not in ("F16", "BF16", "F32"):
        raise UsageProblem(f"no such dtype: {dtype}", hint="one of fp16, bf16, fp32")
    cast = {key: _rounded(key, tensor, name) for key, tensor in made.tensors.items()}
    changed = {key for key in cast if cast[key] is not made.tensors[key]}
    if not changed:
        return made
    if made.tree is not None:
        raise UsageProblem("this container cannot be cast in the same step", hint="convert first, then --dtype")
    wider = name == "F32" and all(made.tensors[key].dtype in ("F16", "BF16") for key in changed)
    why = {} if wider else {f"{len(changed)} tensors": f"cast to {name}"}
    return replace(made, tensors=cast, header=None, rounded={**made.rounded, **why})


def _rounded(key: str, tensor: Expr, dtype: str) -> Expr:
    scalar = key.endswith("alpha") or not tensor.shape
    if scalar or tensor.dtype == dtype or tensor.dtype not in FLOATS:
        return tensor
    return Compute(_finite_cast, (tensor,), tensor.shape, dtype, (("name", key), ("dtype", dtype)))


def _finite_cast(tensor: Any, *, name: str, dtype: str) -> Any:
    import torch

    from hubtool.tensors.dtypes import TORCH_NAME

    result = tensor.to(getattr(torch, TORCH_NAME[dtype]))
    lost = int((torch.isinf(result) & torch.isfinite(tensor)).sum())
    if lost:
        raise BadValues(f"{name}: {lost} values overflow {dtype}", hint="try --dtype bf16")
    return result
