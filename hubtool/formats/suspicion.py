"""What in a healthy file's names and metadata is there to deceive: markup, escapes, formulas, secrets, contradictions.

Nothing here is refused: names are opaque and metadata is data. But who shows, exports or publishes such text should know.
Thousands of headers are read per second, so a rule first looks for plain text that must occur, and only then uses its pattern.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from hubtool.tensors.ref import TensorRef
from hubtool.types import Finding

_LONG_NAME = 1024
_HUGE = 1 << 31
_UNSEEN = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069"
_HIDDEN = f"[{_UNSEEN}]"
_HIDDEN_IN_NAME = rf"[\t\r\n{_UNSEEN}]"
# a bare <name> is how the domain writes trigger words, and <embed> a marker of cloneofsimo's files: only these two act without attributes
_TAG = r"(?i:<(?:script|iframe)\b|<[a-z][a-z0-9]*\s[^<>]*=)"
_EMPTY_HASHES = ("0" * 64, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")


class _Rule(NamedTuple):
    """``pattern`` is only compiled and tried where one of ``anchors`` occurs (in lower case)."""

    code: str
    anchors: tuple[str, ...]
    pattern: str
    message: str


_RULES = (
    _Rule("metadata-html", ("<",), _TAG, "holds HTML"),
    _Rule("metadata-template", ("{{", "{%", "${", "#{"), r"\{\{|\{%|[$#]\{", "holds template code"),
    _Rule(
        "metadata-markdown",
        ("---", "javascript:", "]("),
        r"(?im:^---\s*$|javascript:|!\[[^\]]*\]\(\s*https?:)",
        "holds front matter, a script link or a remote picture",
    ),
    _Rule(
        "metadata-formula",
        ("=", "@", "+", "-"),
        r"=\S|[@+-][A-Za-z.]*\(",
        "would be a formula in a spreadsheet",
    ),
    _Rule(
        "metadata-sql",
        ("drop ", "delete ", "insert ", "update ", "' or "),
        r"(?i:'\s*\)?\s*;\s*(?:DROP|DELETE|INSERT|UPDATE)\b|' OR \d+\s*=\s*\d+)",
        "holds SQL",
    ),
    _Rule(
        "metadata-secret",
        ("hf_", "sk-", "bearer ", "api_key", "ghp_", "token="),
        r"(?i:\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{16,}|\bghp_[A-Za-z0-9]{20,}|\bBearer\s+\S{16,}|(?:api_key|token)=\S{8,})",
        "holds what looks like a secret: remove it before publishing",
    ),
)
_AT_START = {"metadata-formula"}


def of_names(names: Iterable[str]) -> list[Finding]:
    """Findings about tensor names: one for each reason, with the first name it holds for."""
    found = {reason: name for name in reversed(list(names)) for reason in _reasons(name)}
    return [
        Finding("odd-name", "warning", f"a tensor's name {reason}: {_short(name)}") for reason, name in found.items()
    ]


def _reasons(name: str) -> Iterator[str]:
    if not name:
        yield "is empty"
    if len(name) > _LONG_NAME:
        yield f"has {len(name)} characters"
    if re.search(_HIDDEN_IN_NAME, name):
        yield "holds control or direction characters"
    if name.startswith("__") and name.endswith("__"):
        yield "is a Python internal"
    if ".." in name:
        yield "holds '..'"
    if re.search(_TAG, name):
        yield "holds HTML"


def of_metadata(metadata: Mapping[str, str], tensors: Mapping[str, TensorRef]) -> list[Finding]:
    """Findings about string metadata, and about what it claims of ``tensors``."""
    text = "\n".join((*metadata, *metadata.values()))
    lower = text.lower()
    found = [
        Finding(rule.code, "warning", f"the metadata {rule.message} (key {_short(key)})")
        for rule in _RULES
        if any(anchor in lower for anchor in rule.anchors) and (key := _key_matching(rule, metadata)) is not None
    ]
    if not text.isprintable() and re.search(_HIDDEN, text):
        found.append(Finding("metadata-control", "warning", "the metadata holds control or direction characters"))
    found.extend(_of_values(metadata))
    found.extend(_of_claims(metadata, tensors))
    return found


def _key_matching(rule: _Rule, metadata: Mapping[str, str]) -> str | None:
    pattern = re.compile(rule.pattern)
    search = pattern.match if rule.code in _AT_START else pattern.search
    return next((key for key, value in metadata.items() if search(value) or search(key)), None)


def _of_values(metadata: Mapping[str, str]) -> Iterator[Finding]:
    for key, value in metadata.items():
        if "thumbnail" in key and not value.startswith(("data:image/png;", "data:image/jpeg;", "data:image/webp;")):
            yield Finding("metadata-thumbnail", "warning", f"{_short(key)} is no embedded PNG, JPEG or WebP picture")
        if len(value) > 20 and value.isdigit():
            yield Finding("metadata-number", "warning", f"{_short(key)} is a number of {len(value)} digits")
        if value[:1] in ("{", "[") and not value.rstrip().endswith(("}", "]")):
            yield Finding("metadata-json", "warning", f"{_short(key)} begins like JSON and is cut off")


def _of_claims(metadata: Mapping[str, str], tensors: Mapping[str, TensorRef]) -> Iterator[Finding]:
    for key in ("modelspec.hash_sha256", "sshs_model_hash"):
        if metadata.get(key, "").lower().removeprefix("0x") in _EMPTY_HASHES:
            yield Finding("claimed-hash", "warning", f"{key} is no hash of these tensors but a placeholder")
    rank = metadata.get("ss_network_dim", "")
    if metadata.get("ss_network_module") == "networks.lora" and rank.isdecimal() and len(rank) < 7:
        dim = int(rank)
        if not any(dim in ref.shape for ref in tensors.values()):
            yield Finding(
                "claimed-rank", "warning", f"the metadata says rank {dim}, and no tensor has such a dimension"
            )


def of_shapes(tensors: Mapping[str, TensorRef]) -> list[Finding]:
    """Tensors without elements whose other dimensions no program could handle."""
    huge = [ref.name for ref in tensors.values() if 0 in ref.shape and max(ref.shape) > _HUGE]
    return (
        [Finding("absurd-shape", "warning", f"an empty tensor with an absurd shape: {_short(huge[0])}")] if huge else []
    )


def _short(text: str) -> str:
    return ascii(text if len(text) <= 60 else text[:57] + "...")
