"""Custom Diffusion: cross-attention weights plus new tokens, in the five shapes its tools write (``hubtool.adapters.custom_diffusion``)."""

from __future__ import annotations

import os
from collections.abc import Mapping

from hubtool.adapters.custom_diffusion import CROSS, CustomDiffusion, parse
from hubtool.adapters.identity import Identity
from hubtool.formats.base import TensorFile
from hubtool.layouts.kinds._common import adapter_key
from hubtool.layouts.kinds._companions import CODE, missing, present
from hubtool.tensors.ref import TensorRef
from hubtool.types import Finding

ORDER = 25
_TOKEN_SUFFIXES = (".bin", ".safetensors")


def recognise(file: TensorFile) -> Identity | None:
    """Only attn2 weights of a U-Net, in one of the known structures. Raises ``CorruptFile`` for factors that do not fit."""
    found = parse(file.tensors)
    if found is None or any(map(adapter_key, file.tensors)):
        return None
    family = found.family
    return Identity(
        kind="custom_diffusion",
        family=family,
        family_candidates=() if family else tuple(CROSS.values()),
        variant=found.variant,
        layout=found.variant,
        components=_components(file.tensors),
        ranks=tuple(sorted({u.shape[1] for u, _ in found.factors.values()})),
        trigger_words=tuple(dict.fromkeys(item.token for item in found.tokens if item.token)),
        embeddings=found.tokens,
        findings=tuple(_companions(file, found)),
        evidence=("every weight belongs to the cross attention (attn2)",),
    )


def _components(tensors: Mapping[str, TensorRef]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for key in tensors:
        if key != "embed" and not key.startswith("modifier_token."):
            name = key.split(".", 1)[0] if key.startswith("text_encoder") else "unet"
            counts[name] = counts.get(name, 0) + 1
    return counts


def _companions(file: TensorFile, found: CustomDiffusion) -> list[Finding]:
    """diffusers keeps the new tokens in files of their own; factors are of a difference and need their base."""
    notes = []
    if found.variant == "diffusers":
        names = token_files(file)
        what = "the new tokens, one textual inversion each"
        notes.append(present(names, what) if names else missing("<new1>.bin", what))
    if found.factors:
        notes.append(Finding(CODE, "info", "the factors are added to the weights of the base they were trained on"))
    return notes


def token_files(file: TensorFile) -> tuple[str, ...]:
    """``<new1>.bin`` and the like, as the training script names them."""
    try:
        names = sorted(os.listdir(file.path.parent))
    except OSError:
        return ()
    split = (os.path.splitext(name) for name in names)
    return tuple(stem + end for stem, end in split if end in _TOKEN_SUFFIXES and stem[:1] == "<" and stem[-1:] == ">")
