"""Plans a conversion: container, layout, embedding encoding, dtype. Decides only; nothing is written here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from hubtool.adapters.ir import Adapter
from hubtool.adapters.token_embeddings import emit_embedding, parse_embedding
from hubtool.errors import BadValues, ConversionError, UnknownFamily, UsageProblem
from hubtool.formats.base import TensorFile
from hubtool.layouts import receipt as receipts
from hubtool.layouts import tables
from hubtool.layouts.emit import Emission, Loss, emit
from hubtool.layouts.parse import Parsed, recognise
from hubtool.layouts.unwrap import unwrapped
from hubtool.ops.plan import Plan
from hubtool.tensors.dtypes import FLOATS
from hubtool.tensors.expr import Compute, Expr, Read

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
_TORCH = frozenset({"torch-zip", "torch-legacy"})


@dataclass(frozen=True, slots=True)
class Target:
    """What was asked. ``format``: ``safetensors`` or ``torch-zip``; ``layout``: a layout or an embedding encoding; None keeps the source's."""

    format: str | None = None
    layout: str | None = None
    dtype: str | None = None
    family: str | None = None
    component: str | None = None


def plan(file: TensorFile, target: Target) -> Plan:
    """What converting ``file`` to ``target`` will write. Raises ``ConversionError`` and its kin where that is impossible."""
    parsed = recognise(file, target.family)
    if target.layout is None and target.component is None:
        made = _container(file, target.format or "safetensors", parsed)
    elif parsed is not None and parsed.adapter.patches:
        made = _layout(file, parsed, target)
    else:
        made = _encoding(file, target.layout or "", target.format)
    return _cast(made, target.dtype) if target.dtype else made


def _container(file: TensorFile, container: str, parsed: Parsed | None) -> Plan:
    """The same names in another container. What only a pickle could hold becomes metadata or a loss."""
    tensors, _ = unwrapped(file)
    exprs: dict[str, Expr] = {name: Read(ref) for name, ref in tensors.items()}
    if file.format == "png":
        return _encoding(file, "kohya" if container == "safetensors" else "a1111", container)
    same = file.format == container == "safetensors"
    return Plan(
        source=file.path,
        format=container,
        layout=str(parsed.layout) if parsed else None,
        tensors=exprs,
        metadata=dict(file.metadata) if same else _metadata_of(file, container),
        header=file.header_bytes if same else None,
        losses=tuple(_container_losses(file, tensors, container)),
        notes=tuple(_container_notes(file)),
    )


def _metadata_of(file: TensorFile, container: str) -> dict[str, str]:
    if container != "safetensors":
        return {}
    if file.format in _TORCH:
        return {"format": "pt", **{f"hubtool.extra.{key}": value for key, value in file.metadata.items()}}
    return dict(file.metadata)


def _container_losses(file: TensorFile, kept: Mapping[str, Any], container: str) -> Iterator[Loss]:
    dropped = len(file.tensors) - len(kept)
    if dropped:
        _, notes = unwrapped(file)
        parts = "; ".join(note.message for note in notes)
        yield Loss(f"{dropped} tensors of the training state", parts)
    if container == "torch-zip" and file.format not in _TORCH:
        for key in file.metadata:
            if (key, file.metadata[key]) != ("format", "pt"):
                yield Loss(f"metadata {key}", "a torch file has no place for metadata")


def _container_notes(file: TensorFile) -> Iterator[str]:
    for finding in file.findings:
        if finding.severity != "info" or file.format in _TORCH:
            yield finding.message


def _layout(file: TensorFile, parsed: Parsed, target: Target) -> Plan:
    adapter = _selected(parsed.adapter, target.component)
    _refuse_errors(adapter)
    wanted = target.layout or str(parsed.layout)
    if spell(wanted, _family(parsed, target)) == str(parsed.layout) and target.component is None:
        return _container(file, target.format or "safetensors", parsed)
    emission = _emit(adapter, wanted, parsed, target.family)
    container = _container_of(emission, target.format)
    source = receipts.of_file(file, str(parsed.layout))
    if container != "torch-zip" and (source.layout, source.format) == (str(emission.layout), "safetensors"):
        restored = receipts.restore(source, adapter, emission)
        if restored is not None:
            return _restored(file, emission, restored)
    metadata = receipts.carried_metadata(adapter.metadata) | emission.metadata
    if container != "torch-zip":
        metadata |= {receipts.KEY: source.dump()}
    return Plan(
        source=file.path,
        format=container,
        layout=str(emission.layout),
        tensors=emission.tensors,
        metadata=metadata if container != "torch-zip" else {},
        tree=list(emission.tensors.values()) if emission.container == "torch-list" else None,
        config=emission.config or None,
        losses=tuple(emission.losses) + _metadata_losses(adapter, container),
        notes=tuple(emission.notes),
        rounded=emission.rounded,
    )


def _metadata_losses(adapter: Adapter, container: str) -> tuple[Loss, ...]:
    if container != "torch-zip":
        return ()
    kept = receipts.carried_metadata(adapter.metadata, "format")
    return tuple(Loss(f"metadata {key}", "a torch file has no place for metadata") for key in kept)


def _restored(file: TensorFile, emission: Emission, restored: receipts.Restored) -> Plan:
    return Plan(
        source=file.path,
        format="safetensors",
        layout=str(emission.layout),
        tensors=restored.tensors,
        metadata=restored.metadata,
        header=restored.raw,
        notes=("restored from the receipt of origin",),
    )


def _selected(adapter: Adapter, component: str | None) -> Adapter:
    if component is None:
        return adapter
    patches = {key: patch for key, patch in adapter.patches.items() if key[0] == component}
    if not patches:
        raise UsageProblem(
            f"the adapter has no component {component!r}", hint=f"it has {', '.join(adapter.components())}"
        )
    return replace(adapter, patches=MappingProxyType(patches), embeddings=(), extras=MappingProxyType({}))


def _refuse_errors(adapter: Adapter) -> None:
    errors = [finding.message for finding in adapter.findings if finding.severity == "error"]
    if errors:
        raise ConversionError(f"the adapter cannot be converted safely: {errors[0]}")


def _emit(adapter: Adapter, layout: str, parsed: Parsed, asked: str | None) -> Emission:
    """Emit for the one family, or for several candidates when all of them spell every key alike."""
    if adapter.family or asked:
        return emit(adapter, layout, family=asked)
    if not parsed.candidates:
        raise UnknownFamily(
            "no known family has these modules, so they cannot be renamed",
            hint=f"its own layout is {parsed.layout}; hubtool explain shows what was tried",
        )
    emissions = [emit(adapter, layout, family=name) for name in parsed.candidates]
    if any(list(other.tensors) != list(emissions[0].tensors) for other in emissions[1:]):
        names = ", ".join(parsed.candidates)
        raise UnknownFamily(
            f"this adapter fits {names}, which {layout} spells differently", hint="name one with --family"
        )
    return emissions[0]


def _container_of(emission: Emission, asked: str | None) -> str:
    """``safetensors``, ``torch-zip`` or ``peft-folder``: what the layout demands, else what was asked."""
    if emission.container == "torch-list":
        if asked == "safetensors":
            raise UsageProblem(
                "a positional list is a torch file", hint="name the output .pt, or use layout cloneofsimo"
            )
        return "torch-zip"
    if emission.container == "peft-folder":
        return "peft-folder"
    return asked or "safetensors"


def _encoding(file: TensorFile, encoding: str, container: str | None) -> Plan:
    """Another encoding of a textual inversion; the bytes of the vectors stay."""
    tensors, _ = unwrapped(file)
    scalars = {key: _value(text) for key, text in file.metadata.items()}
    found = parse_embedding(tensors, scalars, file.path.stem)
    if found is None:
        text = "neither an adapter layout nor an embedding encoding explains this file"
        raise ConversionError(text, path=file.path, hint=f"hubtool explain {file.path}")
    tree = emit_embedding(found.embeddings, encoding, extra=scalars)
    torch = encoding in ("a1111", "raw", "diffusers-bin") or container == "torch-zip"
    if torch and container == "safetensors":
        raise UsageProblem(
            f"encoding {encoding} is a torch file", hint="name the output .pt, or use encoding kohya or diffusers"
        )
    flat: dict[str, Expr] = tree if isinstance(tree, dict) else {"0": tree}
    if encoding == "a1111" and isinstance(tree, dict):
        flat = tree["string_to_param"]
    tokens = json.dumps([item.token for item in found.embeddings])
    return Plan(
        source=file.path,
        format="torch-zip" if torch else "safetensors",
        layout=encoding,
        tensors=flat,
        tree=tree if torch else None,
        metadata={} if torch else {"format": "pt", "hubtool.tokens": tokens, **_extras(file)},
    )


def _extras(file: TensorFile) -> dict[str, str]:
    if file.format == "safetensors":
        return {key: value for key, value in file.metadata.items() if key != "format"}
    return {f"hubtool.extra.{key}": value for key, value in file.metadata.items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


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


def spell(layout: str, family: str | None) -> str:
    """The full name of a layout (``kohya`` -> ``kohya/sgm`` for SDXL)."""
    return str(tables.layout(layout, family))


def _family(parsed: Parsed, target: Target) -> str | None:
    return target.family or next(iter(parsed.candidates), None)
