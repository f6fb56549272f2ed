"""Where the new tokens of a distilled pipeline go: into the adapter, into files beside it, or, where nothing else is new, into the output."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from hubtool.adapters.ir import Adapter, Embedding
from hubtool.adapters.token_embeddings import canonical_metadata
from hubtool.layouts.emit import emit
from hubtool.ops.plan import Plan
from hubtool.ops.target import SUFFIXES
from hubtool.tensors.expr import Expr
from hubtool.tensors.writer import write_safetensors

_ENCODER_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5"}
_UNFIT = re.compile(r"[^\w.-]+")
_BARE, _SEVERAL = "diffusers", "kohya-sdxl"  # encodings: the token is the key; a key for each encoder


class Asked(Protocol):
    """What a distillation says about its tokens. ``apart``: they shall have files of their own."""

    @property
    def embeddings(self) -> tuple[Embedding, ...]: ...
    @property
    def apart(self) -> bool: ...
    @property
    def family(self) -> str: ...
    @property
    def layout(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Tokens:
    """``inside``: what the output itself holds, key -> vectors, with ``metadata``; ``beside``: a file for each token.

    ``encoding``: of an output that holds nothing else.
    """

    inside: Mapping[str, Expr] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[Path, tuple[Embedding, ...]] = field(default_factory=dict)
    encoding: str | None = None

    @classmethod
    def of(cls, asked: Asked, output: Path) -> Tokens:
        """Where they go beside changed weights."""
        if not asked.embeddings:
            return cls()
        if not asked.apart:
            emission = emit(Adapter(asked.family, {}, asked.embeddings), asked.layout)
            if not emission.losses and emission.container == "safetensors":
                return cls(emission.tensors, emission.metadata)
        return cls(beside=_files(asked.embeddings, output))

    @classmethod
    def alone(cls, asked: Asked, output: Path) -> Tokens:
        """Where they go when no weight changed: one file where one can hold them and its readers take it, else a file for each.

        diffusers reads one token from a file; layouts that pack tokens into an adapter have readers for several in one.
        """
        named = _by_token(asked.embeddings)
        usual = cls.of(asked, output)
        single = all(len(own) == 1 for own in named.values())
        if asked.apart or output.suffix not in SUFFIXES or not (len(named) == 1 or (usual.inside and single)):
            return cls(beside=_files(asked.embeddings, output))
        tensors = {key: vectors for own in named.values() for key, vectors in _keyed(own).items()}
        encoding = _BARE if single else _SEVERAL
        metadata = canonical_metadata(asked.embeddings[0].token, encoding) if len(named) == 1 else {}
        return cls(tensors, metadata, encoding=encoding)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self.beside)

    def within(self, plan: Plan) -> Plan:
        """The plan with the tokens that go into the output itself."""
        if not self.inside:
            return plan
        if self.encoding is not None:
            metadata = {} if plan.format == "torch-zip" else self.metadata
            return replace(plan, layout=self.encoding, tensors=self.inside, metadata=metadata)
        return replace(
            plan, tensors={**plan.tensors, **self.inside}, metadata={**plan.metadata, **self.metadata}, tree=None
        )

    def write(self, metadata: Mapping[str, str], *, force: bool) -> Iterable[Path]:
        """A file for each token: its name is the key for one encoder (diffusers), ``clip_l`` and ``clip_g`` for two (SDXL)."""
        for path, own in self.beside.items():
            said = canonical_metadata(own[0].token, _BARE if len(own) == 1 else _SEVERAL)
            write_safetensors(path, _keyed(own), {**metadata, **said}, force=force)
            yield path


def _by_token(embeddings: Sequence[Embedding]) -> dict[str, tuple[Embedding, ...]]:
    named = dict.fromkeys(str(one.token) for one in embeddings)
    return {token: tuple(one for one in embeddings if one.token == token) for token in named}


def _keyed(own: Sequence[Embedding]) -> dict[str, Expr]:
    """The vectors of one token under their keys."""
    if len(own) == 1:
        return {str(own[0].token): own[0].vectors}
    return {_ENCODER_KEYS[str(one.encoder)]: one.vectors for one in own}


def _files(embeddings: Sequence[Embedding], output: Path) -> dict[Path, tuple[Embedding, ...]]:
    stem = output.stem if output.suffix in SUFFIXES else output.name
    return {
        output.with_name(f"{stem}-{_UNFIT.sub('', token) or f'token{at}'}.safetensors"): own
        for at, (token, own) in enumerate(_by_token(embeddings).items())
    }
