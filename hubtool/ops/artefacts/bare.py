"""Artefacts that are one tensor: aesthetic embeddings, prompt conditionings and CLIP image embeddings.

In a torch file the tensor has no name; in safetensors it is called after what it is (spec/artefacts.md D.4). Only the container changes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from hubtool.adapters.identity import Identity
from hubtool.errors import ConversionError, UsageProblem
from hubtool.formats.base import TensorFile
from hubtool.layouts.unwrap import unwrapped
from hubtool.ops.artefacts._common import carried, metadata_losses, to_torch, unchanged, value
from hubtool.ops.plan import Plan
from hubtool.tensors.dtypes import numel
from hubtool.tensors.expr import Expr, Read, reshape
from hubtool.types import Shape

if TYPE_CHECKING:
    from hubtool.ops.target import Target

SHAPE = "hubtool.shape"  # of the tensor in the torch file, where safetensors has it as (1, width)
KEYS = {"image-space": "aesthetic_embedding", "prompt": "prompt_embeds", "clip-image": "image_embeds"}


def convert(file: TensorFile, identity: Identity, target: Target) -> Plan:
    """The other container. An image embedding keeps its name in both. Raises ``UsageProblem`` for a layout these artefacts do not have."""
    key = KEYS.get(identity.variant or "")
    torch = to_torch(target) or (target.format is None and target.layout == "raw")
    if target.layout not in (None, "raw" if torch and key != "image_embeds" else key):
        hint = f"raw in a torch file, {key} in safetensors"
        raise UsageProblem(f"{identity.kind} has no layout {target.layout} in this container", hint=hint)
    tensors, _ = unwrapped(file)
    if key is None or len(tensors) != 1:
        raise ConversionError(f"{len(tensors)} tensors where one was expected", path=file.path)
    [tensor] = map(Read, tensors.values())
    if torch:
        shaped = reshape(tensor, _origin(file, tensor))
        losses = tuple(metadata_losses(file, (SHAPE,)))
        # without its name an image embedding could be a token's vector
        named = key if key == "image_embeds" else None
        tree = {named: shaped} if named else shaped
        return Plan(file.path, "torch-zip", named or "raw", {named or "0": shaped}, tree=tree, losses=losses)
    if file.format == "safetensors":
        return unchanged(file, {name: Read(ref) for name, ref in tensors.items()}, key)
    shape = (1, *tensor.shape) if key == "aesthetic_embedding" and len(tensor.shape) == 1 else tensor.shape
    note = {} if shape == tensor.shape else {SHAPE: json.dumps(list(tensor.shape))}
    return Plan(file.path, "safetensors", key, {key: reshape(tensor, shape)}, {"format": "pt", **carried(file), **note})


def contents(file: TensorFile) -> dict[str, Expr]:
    """The one tensor, as a row of numbers: its name and its leading ones are the container's."""
    tensors = unwrapped(file)[0].values()
    return {str(i): reshape(Read(ref), (numel(ref.shape),)) for i, ref in enumerate(tensors)}


def _origin(file: TensorFile, tensor: Expr) -> Shape:
    """The shape noted when the tensor left its torch file, where it has as many numbers."""
    said = value(file.metadata.get(SHAPE, "null"))
    plain = isinstance(said, list) and all(type(size) is int and size >= 0 for size in said)
    return tuple(said) if plain and numel(tuple(said)) == numel(tensor.shape) else tensor.shape
