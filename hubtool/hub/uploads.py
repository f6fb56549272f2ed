"""What a publication sends, what a repository holds, and the difference: computed from hashes alone, online or against a receipt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from hubtool.errors import FileError, FileMissing
from hubtool.hub.layout import CARD, INDEX
from hubtool.hub.validation import MAX_REGULAR

Action = Literal["add", "change", "keep", "delete"]
_CHUNK = 1 << 20
_NONE: Mapping[str, Any] = MappingProxyType({})
VERSION = 1
_ROW = {"path": str, "role": str, "size": int, "sha256": str}


@dataclass(frozen=True, slots=True)
class Upload:
    """A file to publish. ``git_sha1``: its id as a git blob, by which the Hub lists files outside LFS. ``about``: facts for the index."""

    path: str
    source: Path | bytes
    size: int
    sha256: str
    git_sha1: str
    role: str = "file"
    about: Mapping[str, Any] = field(default_factory=lambda: _NONE)
    origin: Path | None = None  # the file of the user that it was made from


def upload(path: str, source: Path | bytes, role: str = "file", *, origin: Path | None = None, **about: Any) -> Upload:
    """Describe a file or some bytes, hashed in one pass. Raises ``FileMissing``, ``FileError``."""
    size = len(source) if isinstance(source, bytes) else _size(source)
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    seen = 0
    for chunk in _chunks(source):
        seen += len(chunk)
        sha256.update(chunk)
        if size <= MAX_REGULAR:  # larger files are always in LFS
            sha1.update(chunk)
    if seen != size:
        raise FileError("the file changes while it is read", path=path)
    told = {key: value for key, value in about.items() if value not in (None, "", (), [])}
    return Upload(path, source, size, sha256.hexdigest(), sha1.hexdigest(), role, told, origin)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise FileMissing(f"cannot read: {error.strerror}", path=path) from error


def _chunks(source: Path | bytes) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with open(source, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


@dataclass(frozen=True, slots=True)
class Held:
    """A file that a repository holds: ``sha256`` where it is in LFS or Xet, else ``git_sha1``; a receipt knows both."""

    size: int
    sha256: str | None = None
    git_sha1: str | None = None

    def same(self, other: Upload) -> bool:
        """Whether it has the very bytes of ``other``."""
        if self.sha256:
            return self.sha256 == other.sha256
        return self.git_sha1 == other.git_sha1

    @property
    def digest(self) -> str | None:
        return self.sha256 or self.git_sha1


@dataclass(frozen=True, slots=True)
class Remote:
    """A repository at one commit. ``head`` None: it does not exist. ``index``: hubtool's own file in it, as JSON.

    ``unborn``: the branch that was asked for does not exist yet; this is ``main``, which it will begin from.
    """

    head: str | None = None
    files: Mapping[str, Held] = field(default_factory=lambda: _NONE)
    card: str | None = None
    index: Mapping[str, Any] = field(default_factory=lambda: _NONE)
    private: bool | None = None
    unborn: bool = False

    @property
    def ours(self) -> dict[str, Mapping[str, Any]]:
        """The files that an earlier publication put there, with what the index says about them."""
        rows = self.index.get("files")
        found = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
        return {
            row["path"]: row for row in found if all(isinstance(row.get(name), kind) for name, kind in _ROW.items())
        }


def read_index(data: bytes) -> Mapping[str, Any]:
    """The index in a repository; empty when it is none of ours (it is a convenience, never trusted)."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) and document.get("version") == VERSION else {}


def write_index(
    uploads: Iterable[Upload], kept: Iterable[Mapping[str, Any]], card: Mapping[str, Any], tool: str
) -> bytes:
    """``hubtool.json``: what every file of the repository is, and what of the card is ours. No time: the same facts, the same bytes."""
    rows = {
        one.path: {"path": one.path, "role": one.role, "size": one.size, "sha256": one.sha256, **one.about}
        for one in uploads
        if one.path not in (CARD, INDEX)
    }
    rows = {**{str(row["path"]): dict(row) for row in kept}, **rows}
    document = {"version": VERSION, "tool": tool, "files": [rows[path] for path in sorted(rows)], "card": dict(card)}
    return (json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to one file of the repository. ``before``: the hash that the hub gives for it now."""

    path: str
    action: Action
    size: int
    sha256: str | None
    before: str | None = None
    role: str = ""

    def to_json(self) -> dict[str, Any]:
        row = {"path": self.path, "action": self.action, "size": self.size, "sha256": self.sha256}
        return {**row, "before": self.before, "role": self.role}


def changes(uploads: Sequence[Upload], remote: Remote, deleted: Iterable[str] = ()) -> tuple[Change, ...]:
    """One row for every file sent or held, by path. Files of the repository that we do not know are kept."""
    sent = {one.path: one for one in uploads}
    gone = {path for path in deleted if path in remote.files and path not in sent}
    rows = [_change(one, remote.files.get(path)) for path, one in sent.items()]
    for path, held in remote.files.items():
        if path not in sent:
            rows.append(
                Change(path, "delete" if path in gone else "keep", held.size, held.sha256, held.digest, "theirs")
            )
    return tuple(sorted(rows, key=lambda row: row.path))


def _change(one: Upload, held: Held | None) -> Change:
    action: Action = "add" if held is None else "keep" if held.same(one) else "change"
    return Change(one.path, action, one.size, one.sha256, held.digest if held else None, one.role)
