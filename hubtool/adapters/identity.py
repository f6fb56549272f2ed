"""``Identity``: what detection concluded about a file, with the evidence. Plain data; recognisers of ``layouts/kinds`` return it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hubtool.adapters.ir import Embedding
from hubtool.types import Finding


@dataclass(frozen=True, slots=True)
class Identity:
    """Kind, algorithm, family and layout of a file. Fields are those of ``inspect --json`` (DESIGN 5).

    ``family`` is None when the file cannot tell; ``family_candidates`` then lists every family that fits. ``variant`` is the exact
    structure within the kind (``a1111``, ``diffusers-bin``, ``kohya`` ...). ``evidence`` are sentences for ``explain``. ``claims`` is
    what the metadata says, never merged with what was found.
    """

    kind: str
    algorithm: str | None = None
    family: str | None = None
    family_candidates: tuple[str, ...] = ()
    kind_candidates: tuple[str, ...] = ()
    base_model: str | None = None
    layout: str | None = None
    variant: str | None = None
    components: dict[str, int] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    flags: tuple[str, ...] = ()
    trigger_words: tuple[str, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    findings: tuple[Finding, ...] = ()
    evidence: tuple[str, ...] = ()
    claims: dict[str, Any] = field(default_factory=dict)
