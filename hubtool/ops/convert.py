"""Plans a conversion: container, layout, algorithm, repair, dtype. Decides only; nothing is written here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hubtool.errors import BadValues, ConversionError, UsageProblem
from hubtool.formats.base import TensorFile
from hubtool.layouts.emission import Loss
from hubtool.layouts.parse import Parsed, recognise
from hubtool.layouts.unwrap import unwrapped
from hubtool.ops.plan import Plan
from hubtool.tensors.dtypes import FLOATS
from hubtool.tensors.expr import Compute, Expr, Read

if TYPE_CHECKING:
    from hubtool.adapters.identity import Identity

SUFFIXES = MappingProxyType(
    {".safetensors": "safetensors", ".ckpt": "torch-zip", ".pt": "torch-zip", ".pth": "torch-zip", ".bin": "torch-zip"}
)
DTYPES = MappingProxyType(
    {
        "fp16": "F16",
        "bf16": "BF16",
        "fp32": "F32",
        "f16": "F16",
        "f32": "F32",
        "float16": "F16",
        "float32": "F32",
        "bfloat16": "BF16",
    }
)
ALGORITHMS = ("lora", "locon")
ORIGIN = "origin"  # the layout that the file's receipt remembers
_TORCH = frozenset({"torch-zip", "torch-legacy"})
_WHOLE_MODELS = frozenset({"checkpoint", "diffusers_pipeline", "vae", "text_encoder"})


@dataclass(frozen=True, slots=True)
class Target:
    """What was asked; None keeps the source's.

    ``format``: ``safetensors`` or ``torch-zip``; ``layout``: a layout, an embedding encoding, or ``origin``; ``algorithm``: ``lora`` or
    ``locon``, what modules are rewritten as where that is exact; ``repair``: mend keys that were broken by hand first; ``config_from``: a diffusers folder whose
    configs and tokenizers complete a new one.
    """

    format: str | None = None
    layout: str | None = None
    dtype: str | None = None
    family: str | None = None
    component: str | None = None
    algorithm: str | None = None
    repair: bool = False
    config_from: Path | None = None


def plan(file: TensorFile, target: Target) -> Plan:
    """What converting ``file`` to ``target`` will write. Raises ``ConversionError`` and its kin where that is impossible."""
    if target.repair:
        from hubtool.ops import repairing

        return repairing.plan(file, replace(target, repair=False))
    parsed = recognise(file, target.family)
    adapter = parsed is not None and parsed.adapter.patches
    made = _adapter(file, parsed, target) if parsed and adapter else _other(file, target)
    return _cast(made, target.dtype) if target.dtype else made


def _adapter(file: TensorFile, parsed: Parsed, target: Target) -> Plan:
    from hubtool.ops import adapters, repairing

    if target.layout == ORIGIN:
        return repairing.back(file, parsed, target)
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


def container(file: TensorFile, asked: str | None, parsed: Parsed | None) -> Plan:
    """The same names in another container. What only a pickle or a folder could hold becomes metadata or a loss."""
    kept = "peft-folder" if asked is None and file.format == "peft-folder" else asked or "safetensors"
    tensors, _ = unwrapped(file)
    exprs: dict[str, Expr] = {name: Read(ref) for name, ref in tensors.items()}
    same = file.format == kept == "safetensors"
    return Plan(
        source=file.path,
        format=kept,
        layout=str(parsed.layout) if parsed else None,
        tensors=exprs,
        metadata=dict(file.metadata) if same else _metadata_of(file, kept),
        header=file.header_bytes if same else None,
        config=file.config.get("adapter_config.json") if kept == "peft-folder" else None,
        losses=tuple(_losses(file, tensors, kept, parsed)),
        notes=tuple(_notes(file)),
    )


def _metadata_of(file: TensorFile, kept: str) -> dict[str, str]:
    if kept == "torch-zip":
        return {}
    if file.format in _TORCH:
        return {"format": "pt", **{f"hubtool.extra.{key}": value for key, value in file.metadata.items()}}
    return dict(file.metadata)


def _losses(file: TensorFile, tensors: Mapping[str, Any], kept: str, parsed: Parsed | None) -> Iterator[Loss]:
    dropped = len(file.tensors) - len(tensors)
    if dropped:
        _, notes = unwrapped(file)
        parts = "; ".join(note.message for note in notes)
        yield Loss(
            "1 tensor of the training state" if dropped == 1 else f"{dropped} tensors of the training state", parts
        )
    if kept == "torch-zip" and file.format not in _TORCH:
        for key in file.metadata:
            if (key, file.metadata[key]) != ("format", "pt"):
                yield Loss(f"metadata {key}", "a torch file has no place for metadata")
    if parsed is not None and file.format == "peft-folder" != kept:
        from hubtool.ops import adapters

        yield from adapters.config_losses(parsed.adapter.patches, file.config.get("adapter_config.json", {}))


def _notes(file: TensorFile) -> Iterator[str]:
    for finding in file.findings:
        if finding.severity != "info" or file.format in _TORCH:
            yield finding.message


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
