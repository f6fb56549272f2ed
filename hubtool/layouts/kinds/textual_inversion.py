"""Textual inversion in all its encodings (``hubtool.adapters.token_embeddings``), negative embeddings, and the files they come with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from hubtool.adapters.identity import Identity
from hubtool.adapters.token_embeddings import Parsed, parse_embedding, raw_embedding
from hubtool.formats.base import TensorFile
from hubtool.layouts.kinds import _bundles
from hubtool.layouts.kinds._common import bare, scalars
from hubtool.layouts.kinds._companions import beside, present
from hubtool.types import Finding

ORDER = 22
# No tensor says "negative": names do, and ModelSpec's flag (spec/artefacts.md B.2).
_NEGATIVE = re.compile(
    r"(^|[^a-z])(neg|negative|bad|easynegative|unaesthetic|deepneg|ng)([^a-z]|$)|negative", re.IGNORECASE
)
_PAIR = "-neg"  # DreamArtist's mark
_SUFFIXES = (".pt", ".safetensors", ".bin", ".png", ".webp")


def recognise(file: TensorFile) -> Identity | None:
    """The embeddings with their tokens, encoders and families; None when the tensors are something else."""
    root = bare(file)
    found = (
        parse_embedding(file.tensors, scalars(file), file.path.stem)
        if root is None
        else raw_embedding(root, file.path.stem)
    )
    return None if found is None else _bundles.told(file, _identity(file, found))


def _identity(file: TensorFile, found: Parsed) -> Identity:
    shapes = ", ".join(f"{item.vectors.shape[0]} x {item.vectors.shape[1]}" for item in found.embeddings[:4])
    tokens = tuple(dict.fromkeys(item.token for item in found.embeddings if item.token))
    negative = _negative(file, tokens)
    identity = Identity(
        kind="textual_inversion",
        family=found.family,
        family_candidates=found.family_candidates,
        variant=found.encoding,
        layout=found.encoding,
        flags=("negative",) if negative else (),
        trigger_words=tokens,
        embeddings=found.embeddings,
        findings=found.findings,
        evidence=(f"{found.encoding} structure: {shapes}",),
    )
    return replace(identity, findings=(*identity.findings, *_pair(file, tokens)))


def _negative(file: TensorFile, tokens: tuple[str, ...]) -> bool:
    claimed = file.metadata.get("modelspec.is_negative_embedding", "").lower() == "true"
    return claimed or any(_NEGATIVE.search(name) for name in (file.path.stem, *tokens))


def _pair(file: TensorFile, tokens: tuple[str, ...]) -> Iterator[Finding]:
    """DreamArtist trains two embeddings, ``NAME`` for the prompt and ``NAME-neg`` for the negative prompt."""
    stem = file.path.stem
    name = next((name.removesuffix(_PAIR) for name in (stem, *tokens) if name.endswith(_PAIR)), None)
    if name is None:
        others = beside(file, (stem + _PAIR + suffix for suffix in _SUFFIXES))
        if others:
            yield present(
                others, f"a DreamArtist pair: {stem} belongs in the prompt, {stem}{_PAIR} in the negative prompt"
            )
        return
    hint = f"a DreamArtist pair: {name} belongs in the prompt, {name}{_PAIR} in the negative prompt"
    others = beside(file, (stem.removesuffix(_PAIR) + suffix for suffix in _SUFFIXES)) if stem.endswith(_PAIR) else ()
    if others:
        yield present(others, hint)
    else:
        lone = f"{hint}; {name} is not beside it, and alone this is a plain negative embedding"
        yield Finding("dreamartist-pair", "info", lone)
