"""Adapter -> keys of a layout. Nothing is dropped silently: what a layout cannot hold is a ``Loss``, what had to change is a note."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from hubtool.adapters import registry
from hubtool.adapters.ir import Adapter, Embedding, ModuleKey, Patch
from hubtool.adapters.low_rank import LowRank
from hubtool.adapters.weight_ops import ReshapeWeight
from hubtool.errors import ConversionError
from hubtool.layouts import keys, peft_config, tables
from hubtool.layouts.emission import Emission, Loss
from hubtool.layouts.gathering import gather
from hubtool.layouts.keys import BUNDLE
from hubtool.layouts.tables import Syntax
from hubtool.layouts.vocabulary import weight_shape
from hubtool.tensors import expr as e
from hubtool.tensors.expr import Expr, Literal, Read
from hubtool.types import Shape

_ZERO = {"kohya": "no rotation at all", "lycoris": "no constraint"}
_ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5"}
_PACK = {"F64": "<d", "F32": "<f", "F16": "<e"}


def emit(adapter: Adapter, layout: str, *, family: str | None = None) -> Emission:
    """Spell ``adapter`` in ``layout`` (``kohya``, ``kohya/sgm``, ``diffusers`` ...). ``family`` stands in where the adapter's is unknown.

    Metadata holds only what the layout itself needs; carrying the source's is the caller's choice. Raises ``UnknownLayout``, ``ConversionError``.
    """
    family = adapter.family or family
    target = tables.layout(layout, family)
    syntax = tables.syntaxes()[target.syntax]
    emission = Emission(target, syntax.container)
    if target.naming != "raw" and family is None:
        raise ConversionError(
            "the family of this adapter is unknown, so its modules cannot be renamed", hint="name it with --family"
        )
    if syntax.single_component and len(adapter.components()) > 1:
        parts = ", ".join(adapter.components())
        raise ConversionError(
            f"{syntax.title} holds one component; this adapter has {parts}", hint="choose one with --component"
        )
    if syntax.positional:
        _positions(adapter, syntax, family or "", emission)
    else:
        _names(adapter, syntax, family, emission)
    _rest(adapter, syntax, emission)
    return emission


def _names(adapter: Adapter, syntax: Syntax, family: str | None, out: Emission) -> None:
    prefixes = _own_prefixes(syntax, family)
    carried: dict[ModuleKey, LowRank] = {}
    for (component, path), outside, patch in gather(adapter, out.layout.naming, family, out):
        name = f"{component}.{path}"
        out.patches[component, path] = patch
        spelled = outside if syntax.joiner == "." else outside.replace(".", "_")
        fitted = _fit(patch, family, (component, path), syntax)
        for role, tensor in _tensors(fitted, syntax, name, out):
            key = keys.write(syntax, prefixes, component, spelled, role)
            if key is None:
                out.losses.append(Loss(f"{name}.{role}", f"{syntax.id} has no place for {role} of this module"))
            else:
                out.tensors[key] = tensor
                out.roles[component, path, role] = key
        if isinstance(fitted, LowRank):
            carried[component, outside] = fitted
    if syntax.alpha in ("metadata", "config"):
        _configure(carried, syntax, out)


def _own_prefixes(syntax: Syntax, family: str | None) -> dict[str, str]:
    own = tables.family(family).prefixes.get(syntax.id, {}) if family else {}
    return {component: text + syntax.joiner for component, text in own.items()}


def _fit(patch: Patch, family: str | None, key: ModuleKey, syntax: Syntax) -> Patch:
    """PEFT wraps live modules, so its factors must have the module's own number of dimensions (1x1 convolution against linear)."""
    if not isinstance(patch, LowRank) or family is None or syntax.alpha not in ("metadata", "config"):
        return patch
    shape = weight_shape(family, *key)
    if shape is None:
        return patch
    same = len(patch.weight_shape) == len(shape) or patch.weight_shape[:2] != tuple(shape[:2])
    return patch if same else patch.under(ReshapeWeight(tuple(shape)))


def _tensors(patch: Patch, syntax: Syntax, name: str, out: Emission) -> Iterator[tuple[str, Expr]]:
    """The roles to write, the alpha turned into what the syntax has for it."""
    for role, tensor in patch.roles():
        if role == "alpha":
            continue
        if role == "dora_scale" and isinstance(patch, LowRank):
            yield role, _magnitude(patch, syntax, name, out) or tensor
        elif role == "up" and isinstance(patch, LowRank) and syntax.alpha == "none":
            yield role, _folded(patch, name, out)
        else:
            yield role, tensor
    if patch.algorithm in ("oft", "boft") and patch.alpha_value == 0:
        out.losses += _misread_zero(patch, syntax, name)
    if syntax.alpha == "tensor":
        alpha = _alpha_tensor(patch, name, out)
        if alpha is not None:
            yield "alpha", alpha


def _misread_zero(patch: Patch, syntax: Syntax, name: str) -> Iterator[Loss]:
    """An OFT alpha of 0 that the readers of ``syntax`` take for the opposite of what the file means by it."""
    from hubtool.adapters.rotation import Rotation

    prefix = next(iter(syntax.prefixes.values()))[0]
    theirs = registry.flavour_of("oft", dict(patch.roles()), prefix) or "lycoris"
    if isinstance(patch, Rotation) and patch.flavour != theirs:
        yield Loss(
            f"{name}.alpha", f"alpha 0 means {_ZERO[patch.flavour]} in this file and {_ZERO[theirs]} in {syntax.id}"
        )


def _magnitude(patch: LowRank, syntax: Syntax, name: str, out: Emission) -> Expr | None:
    """DoRA's magnitude in the target's shape. Only PEFT's shape cannot hold one magnitude per input."""
    assert patch.dora_scale is not None
    axis, kernel = patch.dora_axis, len(patch.weight_shape) - 2
    if not syntax.flat_magnitude:
        rows = (patch.up.shape[0],) + (1,) * (kernel + 1)
        return e.reshape(patch.dora_scale, rows) if axis == "out" else None
    if axis == "in":
        out.losses.append(Loss(f"{name}.dora_scale", "PEFT's DoRA has one magnitude per output; this one is per input"))
        return None
    return e.reshape(patch.dora_scale, (1, patch.up.shape[0], 1, 1) if kernel > 0 else (patch.up.shape[0],))


def _alpha_tensor(patch: Patch, name: str, out: Emission) -> Expr | None:
    stored = dict(patch.roles()).get("alpha")
    if stored is not None:
        return stored
    if patch.alpha_value is None:
        return None
    value = patch.alpha_value
    if isinstance(patch, LowRank) and patch.rank_stabilised:
        value = patch.scale * patch.rank
        out.rounded[name] = "alpha of a rank-stabilised module written as alpha * sqrt(rank)"
    return pack(value, _weight_dtype(patch)) or Literal(struct.pack("<f", value), "F32", ())


def _weight_dtype(patch: Patch) -> str:
    return next(tensor.dtype for role, tensor in patch.roles() if role != "alpha")


def pack(value: float, dtype: str, shape: Shape = ()) -> Literal | None:
    """``value`` as a one-element tensor; None when ``dtype`` cannot hold it exactly."""
    if dtype in _PACK:
        try:
            data = struct.pack(_PACK[dtype], value)
        except OverflowError:
            return None
        exact = struct.unpack(_PACK[dtype], data)[0] == value
    elif dtype == "BF16":
        wide = struct.pack("<f", value)
        data, exact = wide[2:], wide[:2] == b"\0\0" and struct.unpack("<f", wide)[0] == value
    elif dtype[0] in "IU" and float(value).is_integer():
        width = int(dtype[1:]) // 8
        data, exact = int(value).to_bytes(width, "little", signed=dtype[0] == "I"), True
    else:
        return None
    return Literal(data, dtype, shape) if exact else None


def _folded(patch: LowRank, name: str, out: Emission) -> Expr:
    """The up factor times the scale: exact for a power of two, otherwise kept in fp32 with one rounding; said in the notes."""
    if patch.scale == 1.0:
        return patch.up
    mantissa = abs(patch.scale)
    while mantissa and mantissa != int(mantissa):
        mantissa *= 2
    power = mantissa > 0 and int(mantissa) & (int(mantissa) - 1) == 0
    dtype = patch.up.dtype if power else "F32"
    out.rounded[name] = f"scale {patch.scale:g} folded into up ({dtype})"
    return e.Compute(_times, (patch.up,), patch.up.shape, dtype, (("factor", patch.scale),))


def _times(tensor: Any, *, factor: float) -> Any:
    return tensor.float() * factor


def _configure(carried: Mapping[ModuleKey, LowRank], syntax: Syntax, out: Emission) -> None:
    document: dict[str, Any] = {}
    for component in dict.fromkeys(component for component, _ in carried):
        patches = {path: patch for (owner, path), patch in carried.items() if owner == component}
        _same_everywhere(component, patches, out)
        config = peft_config.build(
            patches, text_encoder=component.startswith("text_encoder") and syntax.alpha == "metadata"
        )
        if syntax.alpha == "config":
            out.config = {
                "peft_type": "LORA",
                **config,
                "bias": "none",
                "fan_in_fan_out": False,
                "inference_mode": True,
            }
        document |= {f"{component}.{field}": value for field, value in peft_config.anchored(config).items()}
    if syntax.alpha == "metadata" and document:
        out.metadata = {"format": "pt", peft_config.KEY: json.dumps(document, sort_keys=True, separators=(",", ":"))}


def _same_everywhere(component: str, patches: Mapping[str, LowRank], out: Emission) -> None:
    """PEFT switches DoRA and rank stabilisation for a whole component, never for one module."""
    for what, has in (
        ("a DoRA magnitude", lambda p: p.dora_scale is not None),
        ("rank stabilisation", lambda p: p.rank_stabilised),
    ):
        without = [path for path, patch in patches.items() if not has(patch)]
        if without and len(without) < len(patches):
            reason = f"PEFT needs {what} on every module or none; {len(without)} of {len(patches)} lack it, first {without[0]}"
            out.losses.append(Loss(component, reason))


def _positions(adapter: Adapter, syntax: Syntax, family: str, out: Emission) -> None:
    from hubtool.layouts import positional

    for component in adapter.components():
        patches = {path: patch for (owner, path), patch in adapter.patches.items() if owner == component}
        walk = positional.walk_for(syntax, component, family, frozenset(patches))
        if walk is None:
            raise ConversionError(
                f"{syntax.title} names modules by position: {component} needs exactly the modules of a full walk, "
                f"and these {len(patches)} are not one",
                hint="choose another layout",
            )
        for index, path in enumerate(walk.paths):
            out.patches[component, path] = patches[path]
            _position(component, index, path, patches[path], syntax, out)
        if syntax.container == "safetensors":
            out.metadata[component] = json.dumps(list(walk.classes))


def _position(component: str, index: int, path: str, patch: Patch, syntax: Syntax, out: Emission) -> None:
    name = f"{component}.{path}"
    order = {"up": 0, "down": 1}
    for role, tensor in sorted(_tensors(patch, syntax, name, out), key=lambda row: order.get(row[0], 2)):
        if role not in order:
            out.losses.append(Loss(f"{name}.{role}", f"{syntax.id} has no place for {role}"))
            continue
        key = f"{component}:{index}:{role}" if syntax.container == "safetensors" else str(2 * index + order[role])
        out.tensors[key] = tensor
        out.roles[component, path, role] = key
    if syntax.container == "safetensors":
        out.metadata[f"{component}:{index}:rank"] = str(patch.rank)


def _rest(adapter: Adapter, syntax: Syntax, out: Emission) -> None:
    """Embeddings and extras: kept where the syntax has a place for them."""
    for embedding in adapter.embeddings:
        token = embedding.token or "token"
        if syntax.id == "cloneofsimo":
            out.tensors[token] = embedding.vectors
            out.metadata[token] = "<embed>"
        elif syntax.lycoris and "." not in token:
            out.tensors[f"{BUNDLE}{token}.{_bundle_key(embedding, adapter)}"] = embedding.vectors
        else:
            out.losses.append(Loss(f"embedding {token}", f"{syntax.id} has no place for token embeddings"))
    for key, ref in adapter.extras.items():
        if syntax.container == "safetensors" and syntax.alpha == "tensor" and key not in out.tensors:
            out.tensors[key] = Read(ref)
            out.notes.append(f"{key} is not understood and kept as it is")
        else:
            out.losses.append(Loss(key, f"not understood, and {syntax.id} has no place for it"))


def _bundle_key(embedding: Embedding, adapter: Adapter) -> str:
    """One key by itself; one for each encoder where a token has vectors for several, as LyCORIS packs an SDXL embedding."""
    if sum(one.token == embedding.token for one in adapter.embeddings) == 1:
        return "emb_params"
    from hubtool.adapters.token_embeddings import WIDTHS, canonical_key

    known = embedding.vectors.shape[-1] in WIDTHS
    return canonical_key(embedding) if known else _ENCODERS.get(embedding.encoder or "", canonical_key(embedding))
