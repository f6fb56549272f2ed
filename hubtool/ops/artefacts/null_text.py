"""Null-text inversion: stacked or listed in a torch file <-> ``uncond`` (T, 77, width) with its latent in safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hubtool.adapters.identity import Identity
from hubtool.adapters.null_text import NullText, parse
from hubtool.errors import ConversionError, UsageProblem
from hubtool.formats.base import TensorFile
from hubtool.layouts.emission import Loss
from hubtool.layouts.unwrap import unwrapped
from hubtool.ops.artefacts._common import as_metadata, carried, fields, metadata_losses, to_torch, unchanged, value
from hubtool.ops.plan import Plan
from hubtool.tensors.expr import Expr, Read, reshape, rows

if TYPE_CHECKING:
    from hubtool.ops.target import Target

FORM = "hubtool.null_text"
LAYOUTS = ("stacked", "list")


def convert(file: TensorFile, identity: Identity, target: Target) -> Plan:
    """The other container, or stacked <-> list. Raises ``UsageProblem`` for another layout."""
    torch = to_torch(target) or (target.format is None and target.layout == "list")
    if target.layout not in (None, *LAYOUTS):
        raise UsageProblem(f"null-text embeddings have no layout {target.layout}", hint=f"one of {', '.join(LAYOUTS)}")
    found = parse(unwrapped(file)[0])
    if found is None:
        raise ConversionError("these tensors are no null-text inversion", path=file.path)
    if torch:
        return _torch(file, found, target.layout)
    if target.layout == "list":
        raise UsageProblem("a list belongs in a torch file", hint="name the output .pt")
    return _flat(file, found)


def contents(file: TensorFile) -> dict[str, Expr]:
    """All steps as one tensor, and the latent and whatever else lies beside them."""
    found = parse(unwrapped(file)[0])
    if found is None:
        raise ConversionError("these tensors are no null-text inversion", path=file.path)
    others: dict[str, Expr] = {"x_T" if name == found.latent else name: Read(ref) for name, ref in found.others.items()}
    return {"uncond": found.steps, **others}


def _flat(file: TensorFile, found: NullText) -> Plan:
    if file.format == "safetensors":
        return unchanged(file, {name: Read(ref) for name, ref in file.tensors.items()}, "stacked")
    known = {"x_T" if name == found.latent else name: Read(ref) for name, ref in found.others.items()}
    form = {"form": found.form, "key": found.key, "latent": found.latent, "shape": _step_shape(file, found)}
    extra, losses = as_metadata(_facts(file, found))
    metadata = {"format": "pt", **carried(file), FORM: json.dumps(form), **extra}
    return Plan(file.path, "safetensors", "stacked", {"uncond": found.steps, **known}, metadata, losses=losses)


def _step_shape(file: TensorFile, found: NullText) -> list[int]:
    """Shape of one step where it lay: (1, 77, width) nearly always."""
    steps = found.steps.shape[0]
    first = next(ref for name, ref in unwrapped(file)[0].items() if name not in found.others)
    return list(first.shape if found.form == "list" else first.shape[1:]) if steps else []


def _facts(file: TensorFile, found: NullText) -> dict[str, Any]:
    return {name: item for name, item in fields(file).items() if name != found.key}


def _torch(file: TensorFile, found: NullText, layout: str | None) -> Plan:
    said = value(file.metadata.get(FORM, "null"))
    said = said if isinstance(said, Mapping) else {}
    form = layout or said.get("form") or found.form
    steps = _unstacked(found, said) if form == "list" else _stacked(found, said)
    key = said.get("key") if said else found.key
    latent = str(said.get("latent") or found.latent)
    others: dict[str, Expr] = {latent if name == "x_T" else name: Read(ref) for name, ref in found.others.items()}
    facts = fields(file)
    bare = not isinstance(key, str) and not others and not facts
    tree: Any = steps if bare else {key if isinstance(key, str) else "uncond_embeddings": steps, **others, **facts}
    tensors: dict[str, Expr] = {"uncond": found.steps, **others}
    losses: tuple[Loss, ...] = tuple(metadata_losses(file, (FORM,)))
    return Plan(file.path, "torch-zip", form, tensors, tree=tree, losses=losses)


def _stacked(found: NullText, said: Mapping[str, Any]) -> Expr:
    steps, *inner = found.steps.shape
    flat = said.get("shape") == inner and said.get("form") == "stacked"
    return found.steps if flat else reshape(found.steps, (steps, 1, *inner))


def _unstacked(found: NullText, said: Mapping[str, Any]) -> list[Expr]:
    steps, *inner = found.steps.shape
    shape = tuple(inner) if said.get("shape") == inner else (1, *inner)
    return [reshape(rows(found.steps, i, i + 1), shape) for i in range(steps)]
