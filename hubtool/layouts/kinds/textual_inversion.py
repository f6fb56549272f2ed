"""Textual inversion in all its encodings (``hubtool.adapters.token_embeddings``), DreamArtist pairs and negative embeddings."""

from __future__ import annotations

import re

from hubtool.adapters.identity import Identity
from hubtool.adapters.token_embeddings import Parsed, parse_embedding, raw_embedding
from hubtool.formats.base import TensorFile
from hubtool.layouts.kinds._common import bare, scalars
from hubtool.types import Finding

ORDER = 22
# No tensor says "negative": names do, and ModelSpec's flag (spec/artefacts.md B.2).
_NEGATIVE = re.compile(
    r"(^|[^a-z])(neg|negative|bad|easynegative|unaesthetic|deepneg|ng)([^a-z]|$)|negative", re.IGNORECASE
)


def recognise(file: TensorFile) -> Identity | None:
    """The embeddings with their tokens, encoders and families; None when the tensors are something else."""
    root = bare(file)
    found = (
        parse_embedding(file.tensors, scalars(file), file.path.stem)
        if root is None
        else raw_embedding(root, file.path.stem)
    )
    return None if found is None else _identity(file, found)


def _identity(file: TensorFile, found: Parsed) -> Identity:
    shapes = ", ".join(f"{item.vectors.shape[0]} x {item.vectors.shape[1]}" for item in found.embeddings[:4])
    tokens = tuple(dict.fromkeys(item.token for item in found.embeddings if item.token))
    flags, hints = _negative(file, tokens)
    return Identity(
        kind="textual_inversion",
        family=found.family,
        family_candidates=found.family_candidates,
        variant=found.encoding,
        layout=found.encoding,
        flags=flags,
        trigger_words=tokens,
        embeddings=found.embeddings,
        findings=(*found.findings, *hints),
        evidence=(f"{found.encoding} structure: {shapes}",),
    )


def _negative(file: TensorFile, tokens: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[Finding, ...]]:
    names = (file.path.stem, *tokens)
    claimed = file.metadata.get("modelspec.is_negative_embedding", "").lower() == "true"
    if not claimed and not any(_NEGATIVE.search(name) for name in names):
        return (), ()
    pair = next((name.removesuffix("-neg") for name in names if name.endswith("-neg")), None)
    if pair is None:
        return ("negative",), ()
    hint = f"a DreamArtist pair: {pair} belongs in the prompt, {pair}-neg in the negative prompt"
    return ("negative",), (Finding("dreamartist-pair", "info", hint),)
