"""Token embeddings; a DreamArtist pair (``NAME`` for the prompt, ``NAME-neg`` for the negative prompt) is one concept and loads as one.

Facts: spec/artefacts.md B and F.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hubtool.adapters.identity import Identity
from hubtool.adapters.ir import Adapter, Embedding
from hubtool.formats import open_file
from hubtool.formats.base import TensorFile
from hubtool.layouts.identify import identify
from hubtool.pipelines.kinds import Ask, Content, setting
from hubtool.types import Finding

STRENGTH = False
SETTINGS: Mapping[str, Any] = MappingProxyType(
    {"pair": True}
)  # whether the negative half beside the file comes with it
_MARK = "-neg"
_CODE = "dreamartist-pair"


def read(file: TensorFile, identity: Identity, ask: Ask) -> Content:
    """The embeddings of the file, and of its negative half where that lies beside it."""
    adapter = Adapter(identity.family, {}, identity.embeddings, metadata=file.metadata, findings=identity.findings)
    content = Content(adapter, identity.kind, token=ask.token, findings=tuple(_half(file.path)))
    other = partner(file.path) if setting(ask, SETTINGS, "pair") else None
    return content if other is None else _linked(content, other)


def partner(path: Path) -> Path | None:
    """The negative half of a DreamArtist pair beside its positive half, where there is one."""
    if path.stem.endswith(_MARK):
        return None
    other = path.with_name(f"{path.stem}{_MARK}{path.suffix}")
    return other if other.is_file() else None


def _half(path: Path) -> Iterator[Finding]:
    whole = path.with_name(f"{path.stem.removesuffix(_MARK)}{path.suffix}")
    if whole != path and whole.is_file():
        said = f"the negative half of {whole.name}: its token belongs in the negative prompt, where generate adds it"
        yield Finding(_CODE, "info", said)


def _linked(content: Content, other: Path) -> Content:
    """Both halves. The negative token is called after the positive one: trainers leave old names in intermediate files."""
    dark = identify(open_file(other))
    own = list(dict.fromkeys(one.token for one in content.adapter.embeddings))
    if dark.kind != content.kind or len(own) != 1:
        return content
    asked = content.token if content.token is None or isinstance(content.token, str) else content.token[0]
    token = str(asked or own[0] or other.stem.removesuffix(_MARK))
    negative = marked(token)
    halves = (*_named(content.adapter.embeddings, token), *_named(dark.embeddings, negative))
    said = f"{other.name} comes with it, a DreamArtist pair: write {token} in prompts, {negative} in negative prompts"
    adapter = replace(content.adapter, embeddings=halves)
    return Content(adapter, content.kind, negatives=(negative,), findings=(Finding(_CODE, "info", said),))


def marked(token: str) -> str:
    """What the negative half of ``token`` is called: ``art-neg``, ``<art-neg>``."""
    return f"{token[:-1]}{_MARK}>" if token.endswith(">") else token + _MARK


def _named(embeddings: tuple[Embedding, ...], token: str) -> tuple[Embedding, ...]:
    return tuple(replace(one, token=token) for one in embeddings)
