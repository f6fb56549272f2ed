"""``content_id``: one identity for the same adapter in any layout, and for the same tensors in any container."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from hubtool.adapters.ir import Patch
from hubtool.adapters.rotation import Rotation
from hubtool.formats.base import TensorFile
from hubtool.layouts.parse import Parsed, recognise
from hubtool.layouts.unwrap import unwrapped
from hubtool.tensors import hashing
from hubtool.tensors.dtypes import numel
from hubtool.tensors.expr import Expr, Literal, Read, reshape

Item = tuple[str, str, Expr]


def content_id(file: TensorFile) -> str | None:
    """Hash over sorted (canonical path, role, dtype, shape, bytes); None for a file without tensors.

    Adapters: paths are canonical and fused modules cut into their parts; scales are fp64 values whatever carried them (an absent alpha is
    the rank), a rotation's constraint likewise; an alpha that means nothing does not count; factors have the shape of a linear or full
    convolution module. So kohya, diffusers, native and legacy forms of one adapter agree. Everything else: the file's own names.
    Raises ``CorruptFile`` for a broken adapter.
    """
    parsed = recognise(file)
    items = list(_adapter(parsed) if parsed is not None and parsed.adapter.patches else _plain(file))
    return hashing.content_id(items) if items else None


def _plain(file: TensorFile) -> Iterator[Item]:
    tensors, _ = unwrapped(file)
    for name, ref in tensors.items():
        yield name, "", Read(ref)


def _adapter(parsed: Parsed) -> Iterator[Item]:
    adapter = parsed.adapter
    for (component, path), patch in adapter.patches.items():
        for role, tensor in _roles(patch):
            yield f"{component}.{path}", role, tensor
    for embedding in adapter.embeddings:
        yield f"embedding.{embedding.token}", "vectors", embedding.vectors
    for key, ref in adapter.extras.items():
        yield key, "extra", Read(ref)


def _roles(patch: Patch) -> Iterator[tuple[str, Expr]]:
    """What a module does, apart from how it was written: the effect of alpha instead of alpha."""
    per_output = getattr(patch, "dora_axis", None) == "out"
    for role, tensor in patch.roles():
        if role == "dora_scale" and per_output:
            yield role, reshape(tensor, (numel(tensor.shape),))
        elif role != "alpha":
            yield role, _squeezed(tensor)
    yield "scale", _number(patch.scale)
    if isinstance(patch, Rotation) and patch.constraint is not None:
        yield "constraint", _number(patch.constraint)


def _number(value: float) -> Expr:
    return Literal(struct.pack("<d", value), "F64", ())


def _squeezed(tensor: Expr) -> Expr:
    """Without trailing dimensions of one: (r, in, 1, 1) and (r, in) are the same factor, (out, 1) and (out,) the same magnitude."""
    shape = tensor.shape
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return reshape(tensor, shape)
