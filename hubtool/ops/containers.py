"""The same names in another container: what only a pickle, a folder or a configuration could hold becomes metadata or a loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hubtool.adapters.ir import ModuleKey, Patch
from hubtool.formats.base import TensorFile
from hubtool.layouts.emission import Loss
from hubtool.layouts.parse import Parsed
from hubtool.layouts.unwrap import unwrapped
from hubtool.ops.plan import Plan
from hubtool.tensors.expr import Expr, Read

_TORCH = frozenset({"torch-zip", "torch-legacy"})
_ONLY_CONFIG = "only adapter_config.json can carry it, and a single file has none"


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
        yield from config_losses(parsed.adapter.patches, file.config.get("adapter_config.json", {}))


def _notes(file: TensorFile) -> Iterator[str]:
    for finding in file.findings:
        if finding.severity != "info" or file.format in _TORCH:
            yield finding.message


def config_losses(patches: Mapping[ModuleKey, Patch], config: Mapping[str, Any]) -> Iterator[Loss]:
    """What PEFT keys lose without ``adapter_config.json`` beside them: every scale but 1, and transposed weights."""
    for key, patch in patches.items():
        if patch.scale != 1.0:
            yield Loss(f"{'.'.join(key)}.alpha", f"the scale is {patch.scale:g}: {_ONLY_CONFIG}")
    if config.get("fan_in_fan_out") is True:
        yield Loss("fan_in_fan_out", f"the base's weights are stored transposed: {_ONLY_CONFIG}")
