"""Custom Diffusion: cross-attention weights plus new tokens, in the five shapes its tools write (spec/artefacts.md E.1)."""

from __future__ import annotations

from collections.abc import Mapping

from hubtool.adapters.identity import Identity
from hubtool.adapters.ir import Embedding
from hubtool.formats.base import TensorFile
from hubtool.layouts.kinds._common import adapter_key
from hubtool.tensors.expr import Read, reshape
from hubtool.tensors.ref import TensorRef

ORDER = 25
_CROSS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_ENCODER = {768: "text_encoder", 1024: "text_encoder", 1280: "text_encoder_2"}
_COMPVIS = "model.diffusion_model."
Tensors = Mapping[str, TensorRef]


def recognise(file: TensorFile) -> Identity | None:
    """Only attn2 weights of a U-Net, in one of the known structures."""
    tensors = file.tensors
    first = next(iter(tensors), "")
    if "attn" not in first and not first.startswith(("modifier_token", "embed", "unet.", "text_encoder.")):
        return None
    variant = _variant(tensors)
    if variant is None:
        return None
    family = _family(tensors)
    embeddings = tuple(_tokens(tensors))
    return Identity(
        kind="custom_diffusion",
        family=family,
        family_candidates=() if family else tuple(_CROSS.values()),
        variant=variant,
        layout=variant,
        components=_components(tensors),
        trigger_words=tuple(dict.fromkeys(item.token for item in embeddings if item.token)),
        embeddings=embeddings,
        evidence=("every weight belongs to the cross attention (attn2)",),
    )


def _variant(tensors: Tensors) -> str | None:
    if all("_custom_diffusion." in key for key in tensors):
        return "diffusers"
    if all(key == "embed" or (key.startswith(_COMPVIS) and _cross(key)) for key in tensors):
        return _compressed(tensors) or "compvis"
    parts = ("unet.", "modifier_token.", "text_encoder.", "text_encoder_2.")
    if not all(key.startswith(parts) for key in tensors) or not any(key.startswith("unet.") for key in tensors):
        return None
    if not all(_cross(key) for key in tensors if key.startswith("unet.")):
        return None
    return _compressed(tensors) or ("cmu-sdxl" if _pairs(tensors) else "cmu")


def _cross(key: str) -> bool:
    return ".attn2." in key and not adapter_key(key)


def _compressed(tensors: Tensors) -> str | None:
    """k and v kept as {u, v} factors that are added to the base."""
    return "compressed" if any(key.endswith((".u", ".v")) for key in tensors) else None


def _pairs(tensors: Tensors) -> bool:
    return any(key.startswith("modifier_token.") and key.endswith(".1") for key in tensors)


def _family(tensors: Tensors) -> str | None:
    for key, ref in tensors.items():
        reads_text = "attn2" in key and (".to_k" in key or ".to_v" in key) and not key.endswith(".u")
        if reads_text and ref.shape and ref.shape[-1] in _CROSS:
            return _CROSS[ref.shape[-1]]
    return None


def _components(tensors: Tensors) -> dict[str, int]:
    counts: dict[str, int] = {}
    for key in tensors:
        name = key.split(".", 1)[0] if key.startswith("text_encoder") else "tokens" if _token_key(key) else "unet"
        counts[name] = counts.get(name, 0) + 1
    counts.pop("tokens", None)
    return counts


def _token_key(key: str) -> bool:
    return key == "embed" or key.startswith("modifier_token.")


def _tokens(tensors: Tensors) -> list[Embedding]:
    """New tokens. CompVis stores no names: rows of ``embed`` are ``<new1>``, ``<new2>`` ... in the reference code."""
    found = []
    for key, ref in tensors.items():
        if not _token_key(key) or not ref.shape:
            continue
        name = "<new1>" if key == "embed" else key.removeprefix("modifier_token.")
        pair = name.rpartition(".")
        token = pair[0] if pair[0] and pair[2] in ("0", "1") else name
        rows = ref.shape[0] if len(ref.shape) == 2 else 1
        found.append(Embedding(token, _ENCODER.get(ref.shape[-1]), reshape(Read(ref), (rows, ref.shape[-1]))))
    return found
