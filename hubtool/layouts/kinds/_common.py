"""What several recognisers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hubtool.adapters.identity import Identity
from hubtool.formats.base import TensorFile
from hubtool.layouts.kinds._tables import Hit, components, families_by_width, first_hit
from hubtool.tensors.ref import TensorRef

# Suffixes that only adapters use; a file of full weights has none of them (spec/layouts.md 1.2).
ADAPTER_MARKS = (
    ".lora_up.", ".lora_down.", ".lora_A.", ".lora_B.", ".lora.up.", ".lora.down.", "_lora.up.", "_lora.down.",
    ".lora_linear_layer.", ".hada_w", ".lokr_w", ".oft_", ".on_input", ".diff_b", ".lora_magnitude_vector",
)  # fmt: skip


def adapter_key(name: str) -> bool:
    """Whether a tensor name belongs to an adapter by its suffix."""
    return any(mark in name for mark in ADAPTER_MARKS) or name.endswith((".lora_A", ".lora_B", ".diff", ".dora_scale"))


def by_table(file: TensorFile, kind: str) -> Identity | None:
    """Identity of the first row of ``components.toml`` under ``kind`` that fits the file's tensors."""
    hit = first_hit(file.tensors, components(kind))
    return None if hit is None else component_identity(file, kind, hit)


def component_identity(file: TensorFile, kind: str, hit: Hit) -> Identity:
    """Identity of a single component; one fitting family is the family, several are candidates."""
    families = families_by_width(file.tensors, hit) or hit.row.candidates
    single = families[0] if len(families) == 1 else None
    return Identity(
        kind=kind,
        family=single,
        family_candidates=() if single else families,
        variant=hit.row.variant,
        layout=hit.row.layout,
        components={kind: len(file.tensors)},
        evidence=hit.evidence(file.tensors),
    )


def bare(file: TensorFile) -> TensorRef | None:
    """The tensor of a pickle that is nothing but one tensor."""
    return file.structure if isinstance(file.structure, TensorRef) else None


def scalars(file: TensorFile) -> Mapping[str, Any]:
    """Non-tensor leaves of a pickle's top level; of a safetensors file, its metadata."""
    if isinstance(file.structure, Mapping):
        return {key: value for key, value in file.structure.items() if isinstance(value, str | int | float | None)}
    return file.metadata if file.structure is None else {}
