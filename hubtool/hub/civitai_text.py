"""What Civitai's answers mean, and making its HTML harmless. An answer is a stranger's text: evidence, never markup to be trusted."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hubtool.errors import MissingExtra

TAGS = frozenset({
    "p", "br", "hr", "strong", "b", "em", "i", "u", "s", "ul", "ol", "li", "blockquote", "code", "pre", "a",
    "h1", "h2", "h3", "h4", "h5", "h6",
})  # fmt: skip
_BLOCK_END = re.compile(r"<br\b[^>]{0,200}>|</(?:p|li|h[1-6]|blockquote|pre|ul|ol)>", re.IGNORECASE)
_GAP = re.compile(r"\n{3,}")
_MAX_HTML = 256 << 10  # characters of a description that are looked at
_MAX_TEXT = 500
_MAX_WORDS = 200
EMPTY = "e3b0c44298fc"  # AutoV3 of a file without tensors: names nothing
_KINDS = {
    "SHA256": "sha256",
    "AutoV2": "autov2",
    "AutoV3": "autov3",
    "BLAKE3": "blake3",
    "CRC32": "crc32",
    "AutoV1": "autov1",
}
_DIGEST = re.compile(r"[0-9a-f]{6,128}")
_FLAGS = ("allowNoCredit", "allowCommercialUse", "allowDerivatives", "allowDifferentLicense")


def sanitise(text: str) -> str:
    """HTML with nothing left but text, simple markup and http(s) links that say who they are from. Raises MissingExtra."""
    return _nh3().clean(
        text[:_MAX_HTML], tags=set(TAGS), attributes={"a": {"href"}}, url_schemes={"http", "https"}, url_relative="deny",
        link_rel="noopener noreferrer nofollow ugc", strip_comments=True,
    )  # fmt: skip


def plain(text: str) -> str:
    """HTML as plain text, a line a paragraph. Raises MissingExtra."""
    marked = _BLOCK_END.sub(lambda end: end[0] + "\n", text[:_MAX_HTML])
    bare = html.unescape(_nh3().clean(marked, tags=set(), strip_comments=True))
    lines = (" ".join(line.split()) for line in bare.split("\n"))
    return _GAP.sub("\n\n", "\n".join(lines)).strip()


def _nh3() -> Any:
    try:
        import nh3
    except ImportError as error:
        raise MissingExtra("reading what Civitai says", "hub") from error
    return nh3


@dataclass(frozen=True, slots=True)
class Facts:
    """A model version, read leniently. ``match``: the hash of the local file that proves it is this one; None: unproven.

    ``description`` is plain text, ``description_html`` the same with the markup that ``sanitise`` lets through: for pages.
    """

    version_id: int | None
    model_id: int | None
    name: str | None
    version: str | None
    type: str | None
    base_model: str | None
    air: str | None
    creator: str | None
    trigger_words: tuple[str, ...]
    nsfw_level: int | None
    permissions: Mapping[str, Any]
    description: str
    description_html: str
    hashes: Mapping[str, str]
    match: str | None

    @property
    def page(self) -> str | None:
        """The address of the page for people."""
        if self.model_id is None:
            return None
        return f"https://civitai.com/models/{self.model_id}?modelVersionId={self.version_id}"

    def to_json(self) -> dict[str, Any]:
        names = (
            "version_id",
            "model_id",
            "name",
            "version",
            "type",
            "base_model",
            "air",
            "creator",
            "nsfw_level",
            "match",
        )
        facts = {name: getattr(self, name) for name in names}
        return {
            **facts,
            "page": self.page,
            "trigger_words": list(self.trigger_words),
            "permissions": dict(self.permissions),
            "description": self.description,
            "description_html": self.description_html,
            "hashes": dict(self.hashes),
        }


def facts(document: Mapping[str, Any], hashes: Mapping[str, str]) -> Facts:
    """Read a model version; ``hashes`` are those computed from the local file (``sha256``, ``payload_sha256``)."""
    model = _mapping(document.get("model"))
    file, match = find_file(document, hashes)
    said = [text for text in (document.get("description"), model.get("description")) if isinstance(text, str) and text]
    return Facts(
        version_id=_whole(document.get("id")),
        model_id=_whole(document.get("modelId", model.get("id"))),
        name=_text(model.get("name")),
        version=_text(document.get("name")),
        type=_text(model.get("type")),
        base_model=_text(document.get("baseModel")),
        air=_text(document.get("air")),
        creator=_text(_mapping(document.get("creator")).get("username")),
        trigger_words=_words(document.get("trainedWords")),
        nsfw_level=_whole(document.get("nsfwLevel")),
        permissions={name: model[name] for name in _FLAGS if name in model},
        description="\n\n".join(map(plain, said)),
        description_html="\n".join(map(sanitise, said)),
        hashes=claimed(file),
        match=match,
    )


def find_file(document: Mapping[str, Any], hashes: Mapping[str, str]) -> tuple[Mapping[str, Any], str | None]:
    """The file of a version that the local one is, and the hash that proves it: ``sha256``, or ``autov3`` after an edit of the header."""
    files = [_mapping(file) for file in _list(document.get("files"))]
    short = (hashes.get("payload_sha256") or "")[:12]
    proofs = (("sha256", hashes.get("sha256")), ("autov3", short if short != EMPTY else None))
    for name, mine in proofs:
        for file in files:
            if mine and claimed(file).get(name) == mine:
                return file, name
    return {}, None


def claimed(file: Mapping[str, Any]) -> dict[str, str]:
    """The hashes that an entry of ``files`` gives, lower case, under hubtool's names."""
    found = {_KINDS[name]: value for name, value in _mapping(file.get("hashes")).items() if name in _KINDS}
    lower = {name: value.lower() for name, value in found.items() if isinstance(value, str)}
    return {name: value for name, value in lower.items() if _DIGEST.fullmatch(value)}


def _words(value: Any) -> tuple[str, ...]:
    found = (_text(word) for word in _list(value)[:_MAX_WORDS])
    return tuple(dict.fromkeys(word.rstrip(", ") for word in found if word and word.rstrip(", ")))


def _text(value: Any) -> str | None:
    return (" ".join(value.split())[:_MAX_TEXT] or None) if isinstance(value, str) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53 else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
