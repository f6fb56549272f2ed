"""Adapters made from a family's vocabulary with random factors, as the IR and as files of any layout."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

from hubtool.adapters.ir import Adapter, ModuleKey, Patch
from hubtool.adapters.low_rank import LowRank
from hubtool.layouts import emit, tables, vocabulary
from hubtool.tensors.expr import Literal
from hubtool.tensors.writer import write_safetensors
from hubtool.types import Shape

_CODE = {"F32": "f", "F16": "e"}
# random byte -> top byte of a number between 0.125 and 1 of either sign
_TOP = {
    "F32": bytes((0x3E, 0xBE)[b & 1] for b in range(256)),
    "F16": bytes(0x30 | (b & 0x80) | (b & 7) for b in range(256)),
}


def values(shape: Shape, seed: int, dtype: str = "F32") -> Literal:
    """Random finite numbers between 0.125 and 1 in size; equal seeds give equal tensors. Fast: bytes, not arithmetic."""
    width = struct.calcsize(_CODE[dtype])
    raw = bytearray(random.Random(seed).randbytes(width * math.prod(shape)))
    raw[width - 1 :: width] = raw[width - 1 :: width].translate(_TOP[dtype])
    return Literal(bytes(raw), dtype, shape)


def scalar(value: float, dtype: str = "F32") -> Literal:
    return Literal(struct.pack(f"<{_CODE[dtype]}", value), dtype, ())


def attention(family: str, limit: int | None = None) -> list[ModuleKey]:
    """The attention and feed-forward projections kohya trains, over every component (of the family's first size), ``limit`` per component."""
    found: list[ModuleKey] = []
    for component in adapted(family):
        modules = vocabulary.model(vocabulary.models(family, component)[0])
        weights = [m for m, parameters in modules.items() if len(parameters.get("weight", ())) >= 2]
        names = [m for m in weights if _trained(m)] or weights
        found += [(component, name) for name in names[:limit]]
    return found


def adapted(family: str) -> list[str]:
    """The components that adapters change."""
    return [component for component in tables.family(family).components if component != "vae"]


def _trained(name: str) -> bool:
    return (
        name.endswith(("to_q", "to_k", "to_v"))
        or ".attn" in name
        or ".ff.net" in name
        or "_proj" in name
        or ".mlp.fc" in name
    )


def make(
    family: str,
    modules: Iterable[ModuleKey] | None = None,
    *,
    ranks: tuple[int, ...] = (4,),
    alphas: tuple[float | None, ...] = (None,),
    dtype: str = "F32",
    seed: int = 0,
) -> Adapter:
    """An adapter of real names and shapes. Ranks and alphas are dealt out in turn, one of each to the parts of a fused weight, which share ``down``."""
    patches: dict[ModuleKey, Patch] = {}
    groups: dict[ModuleKey, int] = {}
    for n, (component, path) in enumerate(modules if modules is not None else attention(family, 6)):
        shape = vocabulary.weight_shape(family, component, path)
        assert shape is not None, path
        i = groups.setdefault((component, fused(family, component).get(path, (path,))[0]), len(groups))
        rank, alpha = ranks[i % len(ranks)], alphas[i % len(alphas)]
        ones = (1,) * (len(shape) - 2)
        patches[component, path] = LowRank(
            up=values((shape[0], rank, *ones), seed + 2 * n, dtype),
            down=values((rank, *shape[1:]), seed + 2 * i + 1, dtype),
            alpha=None if alpha is None else scalar(alpha, dtype),
            alpha_value=alpha,
        )
    return Adapter(family, MappingProxyType(patches))


@cache
def fused(family: str, component: str) -> Mapping[str, tuple[str, ...]]:
    """canonical path -> all parts of the fused weight it lies in, by the family's whole namings."""
    namings = [one for one in tables.family(family).naming_tables if not one.partial]
    places = (vocabulary.places(family, one.id, component).items() for one in namings)
    return {path: place.parts for rows in places for path, place in rows if place.op == "rows"}


def closed(family: str, modules: Iterable[ModuleKey]) -> list[ModuleKey]:
    """``modules`` and whatever shares a fused weight with them."""
    rows = ((c, part) for c, path in modules for part in fused(family, c).get(path, (path,)))
    return list(dict.fromkeys(rows))


def write(adapter: Adapter, path: Path, layout: str, metadata: dict[str, str] | None = None) -> Path:
    """Write the adapter as a safetensors file in ``layout``."""
    emission = emit(adapter, layout)
    assert not emission.losses, emission.losses[:3]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, emission.tensors, {**emission.metadata, **(metadata or {})} or None)
    return path


def layouts(family: str) -> list[str]:
    """Every (syntax, naming) a safetensors LoRA of the family can have: syntaxes with a prefix for its denoiser, positional ones apart."""
    fit = [
        s
        for s in tables.syntaxes().values()
        if s.container == "safetensors" and not s.positional and "up" in s.roles["*"]
    ]
    return [f"{s.id}/{naming}" for s in fit if not s.needs or "down" in s.needs for naming in namings(s, family)]


def namings(syntax: tables.Syntax, family: str) -> list[str]:
    """The namings that adapters of the family can have in a syntax."""
    table = tables.family(family)
    whole = ["diffusers", *(one.id for one in table.namings.values() if not one.partial)]
    return _namings(syntax, table, whole) if adapted(family)[0] in syntax.prefixes else []


def _namings(syntax: tables.Syntax, table: tables.Family, whole: list[str]) -> list[str]:
    """A syntax that is one naming's own (XLabs) exists only in families that have it."""
    partial = [one.id for one in table.namings.values() if one.partial]
    own = syntax.namings[0]
    if own in ("*", "native", "diffusers", "native-parts"):
        return whole
    return [own] if own in partial else []
