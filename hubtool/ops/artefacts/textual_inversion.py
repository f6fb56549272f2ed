"""Textual inversion: another container, or another encoding. The vectors' bytes stay; what an encoding has no place for is a loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hubtool.adapters.identity import Identity
from hubtool.adapters.ir import Embedding
from hubtool.adapters.token_embeddings import ENCODINGS, Parsed, emit_embedding, parse_embedding, raw_embedding
from hubtool.errors import ConversionError, UsageProblem
from hubtool.formats.base import TensorFile
from hubtool.layouts.emission import Loss
from hubtool.layouts.unwrap import unwrapped
from hubtool.ops.artefacts import bare
from hubtool.ops.artefacts._common import (
    EXTRA,
    as_json,
    carried,
    fields,
    leaves,
    metadata_losses,
    to_torch,
    unchanged,
)
from hubtool.ops.plan import Plan
from hubtool.tensors.expr import Expr, Read, sources

if TYPE_CHECKING:
    from hubtool.ops.target import Target

TOKEN, VARIANT = "hubtool.token", "hubtool.variant"
# encoding found -> the encoding of the other container. What is in neither row keeps its keys (kohya-sdxl, cog-sdxl, xti ...).
_TO_SAFETENSORS = {
    "a1111": "kohya", "rinongal": "kohya", "raw": "kohya", "emb-pair": "kohya-sdxl", "emb-history": "kohya-sdxl",
    "diffusers": "diffusers",
}  # fmt: skip
_TO_TORCH = {"a1111": "a1111", "rinongal": "a1111", "kohya": "a1111", "raw": "raw", "diffusers": "diffusers-bin"}
_TORCH_ONLY = ("a1111", "raw", "diffusers-bin")
_NAMELESS = ("kohya", "kohya-sdxl", "cog-sdxl", "canonical", "xti")  # the file's name is the token
_ALIASES = {"pti": "cog-sdxl", "sdxl": "kohya-sdxl", "webui": "kohya"}
_A1111 = ("name", "step", "sd_checkpoint", "sd_checkpoint_name")
_STAR = 265  # CLIP's id of *, which A1111 and rinongal train under


def convert(file: TensorFile, identity: Identity, target: Target) -> Plan:
    """``target.layout`` is an encoding; None keeps what the other container can hold of the present one.

    ``target.component`` picks the vectors of one text encoder. Raises ``UsageProblem`` where an encoding cannot hold the embedding.
    """
    if target.layout in bare.KEYS.values():
        return _as_image_space(file, identity, target)
    found = _parsed(file)
    torch = _container(file, found, target)
    wanted = _encoding(found.encoding, target, torch)
    if target.component is None and wanted == found.encoding and not torch and file.format == "safetensors":
        return unchanged(file, {name: Read(ref) for name, ref in file.tensors.items()}, wanted)
    items = _chosen(found, target.component)
    return (
        _same_keys(file, found, wanted, torch)
        if wanted not in ENCODINGS
        else _written(file, found, items, wanted, torch)
    )


def contents(file: TensorFile) -> dict[str, Expr]:
    """The vectors by encoder width and position, whatever the encoding."""
    items = _parsed(file).embeddings
    return {f"{i}.{item.vectors.shape[-1]}": item.vectors for i, item in enumerate(items)}


def _as_image_space(file: TensorFile, identity: Identity, target: Target) -> Plan:
    """The user knows better: a raw vector is an aesthetic embedding, not a token."""
    variant = next(name for name, key in bare.KEYS.items() if key == target.layout)
    return bare.convert(file, replace(identity, variant=variant, layout=target.layout), target)


def _parsed(file: TensorFile) -> Parsed:
    tensors, _ = unwrapped(file)
    root = tensors.get("(root)")
    known = {**file.metadata, **{name: item for name, item in fields(file).items() if name in _A1111}}
    found = raw_embedding(root, file.path.stem) if root else parse_embedding(tensors, known, file.path.stem)
    if found is None:
        raise ConversionError("no embedding encoding explains these tensors", path=file.path)
    return found


def _container(file: TensorFile, found: Parsed, target: Target) -> bool:
    wanted = _ALIASES.get(target.layout or "", target.layout)
    torch = to_torch(target) or (target.format is None and wanted in _TORCH_ONLY)
    if wanted in _TORCH_ONLY and not torch:
        hint = "name the output .pt, or use encoding kohya or diffusers"
        raise UsageProblem(f"encoding {wanted} is a torch file", hint=hint)
    return torch


def _encoding(found: str, target: Target, torch: bool) -> str:
    if target.layout is not None:
        return _ALIASES.get(target.layout, target.layout)
    if target.component is not None:
        return "kohya" if not torch else "a1111"
    return (_TO_TORCH if torch else _TO_SAFETENSORS).get(found, found)


def _chosen(found: Parsed, component: str | None) -> tuple[Embedding, ...]:
    if component is None:
        return found.embeddings
    chosen = tuple(item for item in found.embeddings if item.encoder == component)
    if not chosen:
        held = ", ".join(dict.fromkeys(item.encoder or "unknown" for item in found.embeddings))
        raise UsageProblem(f"there are no vectors for {component}", hint=f"there are for {held}")
    return chosen


def _same_keys(file: TensorFile, found: Parsed, wanted: str, torch: bool) -> Plan:
    """An encoding that is read and never made anew (xti): the same keys in the other container."""
    tensors = {name: Read(ref) for name, ref in unwrapped(file)[0].items()}
    if wanted != found.encoding:
        raise UsageProblem(f"no such embedding encoding: {wanted}", hint=f"one of {', '.join(ENCODINGS)}")
    if torch:
        return Plan(
            file.path, "torch-zip", wanted, tensors, tree=dict(tensors), losses=tuple(_torch_losses(file, wanted))
        )
    return Plan(file.path, "safetensors", wanted, tensors, _metadata(file, found.embeddings, wanted, {}))


def _written(file: TensorFile, found: Parsed, items: tuple[Embedding, ...], wanted: str, torch: bool) -> Plan:
    scalars = {name: item for name, item in fields(file).items() if name in _A1111}
    tree = emit_embedding(items, wanted, extra=scalars)
    losses = [*_unread(file, found), *(_torch_losses(file, wanted) if torch else ())]
    return Plan(
        source=file.path,
        format="torch-zip" if torch else "safetensors",
        layout=wanted,
        tensors=leaves(tree),
        metadata={} if torch else _metadata(file, items, wanted, scalars),
        tree=tree if torch else None,
        losses=tuple(losses),
        notes=tuple(_notes(file, found)),
    )


def _metadata(
    file: TensorFile, items: tuple[Embedding, ...], wanted: str, scalars: Mapping[str, Any]
) -> dict[str, str]:
    token = next((item.token for item in items if item.token), None)
    named = {TOKEN: token} if token and wanted in _NAMELESS else {}
    extra = {EXTRA + name: text for name, item in scalars.items() if (text := as_json(item)) is not None}
    return {"format": "pt", **carried(file), **named, **extra}


def _torch_losses(file: TensorFile, wanted: str) -> Iterator[Loss]:
    yield from metadata_losses(file, (TOKEN, VARIANT, "hubtool.tokens", "hubtool.source_sha256"))
    if wanted != "a1111" and file.header_bytes:
        for key in file.metadata:
            if key.startswith(EXTRA) and file.metadata[key] != "null" and key != f"{EXTRA}name":
                yield Loss(f"metadata {key}", f"{wanted} has no place for it")


def _unread(file: TensorFile, found: Parsed) -> Iterator[Loss]:
    """Tensors that are in no vector of the embedding: earlier snapshots of a training history."""
    used = {(ref.path, ref.name) for item in found.embeddings for ref in sources(item.vectors)}
    left = [name for name, ref in unwrapped(file)[0].items() if (ref.path, ref.name) not in used]
    left = [name for name in left if not name.startswith("string_to_token")]
    if left:
        what = "1 tensor" if len(left) == 1 else f"{len(left)} tensors"
        yield Loss(what, f"earlier snapshots of the training, first {left[0]}; the last one is kept")


def _notes(file: TensorFile, found: Parsed) -> Iterator[str]:
    ids = _ids(file)
    if any(number != _STAR for number in ids):
        yield f"the token ids {', '.join(map(str, ids))} are those of the training; A1111 reads the vectors under {_STAR} (*)"
    if file.format == "png":
        yield "the picture itself is not written"
    if found.encoding == "rinongal":
        yield f"string_to_token is written as {_STAR}, the id of *"


def _ids(file: TensorFile) -> tuple[int, ...]:
    held = file.structure.get("string_to_token") if isinstance(file.structure, Mapping) else None
    return tuple(item for item in held.values() if type(item) is int) if isinstance(held, Mapping) else ()
