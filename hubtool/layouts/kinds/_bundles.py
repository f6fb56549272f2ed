"""Embeddings that are one file of a bundle: cog-sdxl's trio, cloneofsimo's trio, Pivotal Tuning of diffusers, sd-concepts folders.

Facts: spec/artefacts.md B.5, B.7 and B.8. Only the names of the other files are looked up, and two small texts are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from hubtool.adapters.identity import Identity
from hubtool.errors import FileError
from hubtool.formats.base import TensorFile
from hubtool.formats.documents import is_plain_name, read_json
from hubtool.layouts.kinds._companions import beside, missing, one_of, present
from hubtool.types import Finding

_PTI, _PARAMS, _IDENTIFIER = "embeddings.pti", "special_params.json", "token_identifier.txt"
_TOKENS = re.compile(r"(?:<[^<>\s]{1,60}>)+")
_MOST_TEXT = 1 << 16
_HALVES = {"learned_embeds.safetensors": "learned_embeds_2.safetensors", "learned_embeds.bin": "learned_embeds_2.bin"}


def told(file: TensorFile, identity: Identity) -> Identity:
    """The identity with what the bundle's other files add: names of tokens, and which files are there or missing."""
    for rule in _RULES:
        identity = rule(file, identity)
    return identity


def _cog(file: TensorFile, identity: Identity) -> Identity:
    """``embeddings.pti`` + ``lora.safetensors`` or ``unet.safetensors`` + ``special_params.json`` {"TOK": "<s0><s1>"}."""
    if identity.variant != "cog-sdxl" or not file.path.name.endswith(_PTI):
        return identity
    start = file.path.name.removesuffix(_PTI)  # collections put the owner before every name
    weights = (f"{start}lora.safetensors", f"{start}unet.safetensors")
    findings = [one_of(file, weights, "the weights these tokens were trained with", warn=True)]
    words = _special_params(file, start + _PARAMS)
    what = (
        "; ".join(f"{word} in a prompt stands for {tokens}" for word, tokens in words.items())
        or "the names of the tokens"
    )
    findings.append(present([start + _PARAMS], what) if words else missing(start + _PARAMS, what))
    triggers = tuple(words) or identity.trigger_words
    return replace(identity, trigger_words=triggers, findings=(*identity.findings, *findings))


def _special_params(file: TensorFile, name: str) -> dict[str, str]:
    if not beside(file, [name]):
        return {}
    try:
        document = read_json(file.path.parent / name)
    except FileError:
        return {}
    pairs = document.items() if isinstance(document, dict) else ()
    return {word: text for word, text in pairs if isinstance(text, str) and _TOKENS.fullmatch(text)}


def _cloneofsimo(file: TensorFile, identity: Identity) -> Identity:
    """``x.pt`` (U-Net), ``x.text_encoder.pt`` and ``x.ti.pt``."""
    name = file.path.name
    if not name.endswith(".ti.pt"):
        return identity
    start = name.removesuffix(".ti.pt")
    held = beside(file, (f"{start}.pt", f"{start}.text_encoder.pt"))
    what = "the positional lists these tokens were trained with"
    note = present(held, what) if held else missing(f"{start}.pt", what)
    return replace(identity, findings=(*identity.findings, note))


def _pivotal(file: TensorFile, identity: Identity) -> Identity:
    """diffusers' advanced DreamBooth scripts: ``NAME_emb.safetensors`` beside ``NAME.safetensors``."""
    if not file.path.stem.endswith("_emb"):
        return identity
    names = (file.path.stem.removesuffix("_emb") + file.path.suffix, "pytorch_lora_weights.safetensors")
    found = beside(file, names)
    if not found:
        return identity
    what = "the LoRA these tokens were trained with (Pivotal Tuning)"
    return replace(identity, findings=(*identity.findings, present(found, what)))


def _second_half(file: TensorFile, identity: Identity) -> Identity:
    """The SDXL training script writes one file per text encoder."""
    pairs = {**_HALVES, **{second: first for first, second in _HALVES.items()}}
    found = beside(file, [pairs[file.path.name]]) if file.path.name in pairs else ()
    if not found:
        return identity
    note = present(found, "the same token for SDXL's other text encoder")
    return replace(identity, findings=(*identity.findings, note))


def _concept(file: TensorFile, identity: Identity) -> Identity:
    """sd-concepts-library: ``token_identifier.txt`` names the token, or several, one a line. The file's own key wins."""
    if identity.variant != "diffusers" or not beside(file, [_IDENTIFIER]):
        return identity
    lines = _lines(file)
    if not lines or set(identity.trigger_words) & set(lines):
        return identity
    said = ", ".join(lines[:4])
    text = f"{_IDENTIFIER} says {said}, the file itself {', '.join(identity.trigger_words)}; the file is right"
    return replace(identity, findings=(*identity.findings, Finding("claim-contradicts", "warning", text)))


def _lines(file: TensorFile) -> list[str]:
    path = file.path.parent / _IDENTIFIER
    try:
        with path.open("rb") as text:
            data = text.read(_MOST_TEXT)
    except OSError:
        return []
    lines = (line.strip() for line in data.decode("utf-8", "replace").splitlines())
    return [line for line in lines if line and is_plain_name(line.strip("<>"))]


_RULES: tuple[Callable[[TensorFile, Identity], Identity], ...] = (_cog, _cloneofsimo, _pivotal, _second_half, _concept)
