"""Finds what nobody meant to publish: secrets, paths of a training machine, names of its users (spec/security.md 9).

Secrets are refused and never quoted. Paths shrink to their last part, user names become ``user``; both only where the owner agrees.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hubtool.types import Finding

# Lists of training folders; what they tell about trigger words is in the card by then.
DROPPED = frozenset({"ss_dataset_dirs", "ss_reg_dataset_dirs"})
_PLAIN = frozenset({"lora_adapter_metadata", "format"})  # technical: module paths with dots, no folders
# Written by the author for everybody to read.
_MEANT = (
    "modelspec.author",
    "modelspec.title",
    "modelspec.description",
    "modelspec.license",
    "ssmd_author",
    "ssmd_source",
)
_SECRETS = (
    ("a Hugging Face token", r"\bhf_[A-Za-z0-9]{20,}"),
    ("a bearer token", r"\bBearer\s+[\w.~+/=-]{8,}"),
    ("a password or key", r"(?i)(?<![a-z])(?:api[_-]?key|access[_-]?token|secret|password|passwd|token)[\"']?\s*[=:]\s*[\"']?(?=[^\s\"']*\d)(?=[^\s\"']*[A-Za-z])[A-Za-z0-9_\-./+]{16,}"),
    ("an OpenAI key", r"\bsk-[A-Za-z0-9_-]{16,}"),
    ("a GitHub token", r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})"),
    ("an AWS key", r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    ("a Slack token", r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
    ("a private key", r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    ("a URL with a password", r"\b[a-z][a-z0-9+.-]*://[^\s/:@]+:[^\s/:@]+@"),
)  # fmt: skip
_SECRET = tuple((what, re.compile(pattern)) for what, pattern in _SECRETS)
_PART = r"[^\s/\\\"'<>|:*?,;(){}\[\]]"
_POSIX = rf"(?:(?<=^)|(?<=[\s\"'=,;:(\[])|(?<=file://))(?:~|\.\.?)?/(?!/)(?:{_PART}+/)+{_PART}*"
_WINDOWS = rf"(?<![A-Za-z])[A-Za-z]:(?:\\+|/(?!/))(?:{_PART}+[\\/]+)*{_PART}*"
_SHARE = rf"(?<![\\\w])\\\\{_PART}+\\(?:{_PART}+\\)*{_PART}*"
_PATH = re.compile(f"{_POSIX}|{_WINDOWS}|{_SHARE}")
_WHOLE = re.compile(r"(?:~?/|[A-Za-z]:[\\/]|\\\\)[^\n\"]*")  # a whole value that is one path may hold blanks
_HOME = re.compile(r"(?:/home[/]|[\\/]Users[\\/]+)([^/\\\"'\s]{3,})")
_NOBODY = frozenset({"user", "users", "root", "admin", "ubuntu", "public", "shared", "runner", "workspace", "default", "administrator"})  # fmt: skip
_MAX_DEPTH = 40


@dataclass(slots=True)
class Cleaning:
    """What was found while cleaning. ``secrets`` and ``private``: where -> what, never the text itself."""

    keep: bool = False  # leave paths and user names where they are
    names: set[str] = field(default_factory=set)
    tokens: tuple[str, ...] = ()  # the credentials in use, sought literally
    secrets: dict[str, str] = field(default_factory=dict)
    private: dict[str, str] = field(default_factory=dict)

    def findings(self) -> list[Finding]:
        """Errors for secrets, warnings for what was removed (or kept because it was asked for)."""
        done = "published as they are" if self.keep else "removed"
        found = [
            Finding("secret", "error", f"{where} holds {what}; revoke it, then leave it out with --drop-metadata")
            for where, what in sorted(self.secrets.items())
        ]
        return found + [
            Finding("private", "warning", f"{where}: {what}; {done}") for where, what in sorted(self.private.items())
        ]

    def metadata(self, values: Mapping[str, str], where: str) -> dict[str, str]:
        """String metadata of a tensor file without what is private."""
        for key, text in values.items():
            self._secrets(f"{key}={text}", f"{where} {key}")
            self.names |= {name for name in _HOME.findall(text.replace("\\\\", "\\")) if name.lower() not in _NOBODY}
        kept = {}
        for key, text in values.items():
            new = None if key in DROPPED and not self.keep else self._value(key, text)
            if new != text:
                self.private[f"{where} {key}"] = (
                    "the folders of the training data" if new is None else "a path or a user"
                )
            if new is not None or self.keep:
                kept[key] = text if self.keep or new is None else new
        return kept

    def _value(self, key: str, text: str) -> str:
        if key in _PLAIN:
            return text
        document = _document(text)
        if document is None:
            return self._text(text, deliberate=key in _MEANT)
        cleaned = self._walk(document, 0)
        return text if cleaned == document else json.dumps(cleaned, ensure_ascii=False)

    def document(self, value: Any, where: str) -> Any:
        """A JSON document (a config of a folder) without what is private."""
        text = json.dumps(value, ensure_ascii=False)
        self._secrets(text, where)
        cleaned = self._walk(value, 0)
        if cleaned != value:
            self.private[where] = "a path or a user"
        return value if self.keep else cleaned

    def text(self, text: str, where: str) -> str:
        """Free text (a card) is never changed; secrets in it are found, paths are told."""
        self._secrets(text, where)
        return text

    def line(self, text: str) -> str:
        """A line for the card (a title, a trigger word) without paths."""
        return text if self.keep else self._text(text, deliberate=True)

    def raw(self, data: bytes, where: str) -> None:
        """Look for secrets in the bytes of a small file."""
        self._secrets(data.decode("latin-1"), where)

    def _secrets(self, text: str, where: str) -> None:
        if any(token and token in text for token in self.tokens):
            self.secrets[where] = "the token in use"
            return
        for what, pattern in _SECRET:
            if pattern.search(text):
                self.secrets[where] = what
                return

    def _walk(self, value: Any, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            return None
        if isinstance(value, Mapping):
            return {self._text(str(key)): self._walk(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list):
            return [self._walk(item, depth + 1) for item in value]
        return self._text(value) if isinstance(value, str) else value

    def _text(self, text: str, *, deliberate: bool = False) -> str:
        if _WHOLE.fullmatch(text.strip()) and _PATH.match(text.strip()):
            return last_part(text)
        shorter = _PATH.sub(lambda match: last_part(match[0]), text)
        if deliberate or not self.names:
            return shorter
        return re.sub(rf"(?<![^\W_])(?:{'|'.join(map(re.escape, sorted(self.names)))})(?![^\W_])", "user", shorter)


def _document(text: str) -> Any:
    """The JSON object or list that a metadata value is; None for any other text."""
    if text[:1] not in ("{", "["):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def last_part(path: str) -> str:
    """The name at the end of a path, whatever system wrote it."""
    parts = [part for part in re.split(r"[\\/]+", path.strip()) if part]
    return parts[-1] if parts else ""
