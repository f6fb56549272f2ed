"""Plain records that go into and come out of the library. No SQLAlchemy, no tensors."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from hubtool.types import Finding


class Reader(Protocol):
    """Runs a SELECT with ``:name`` parameters. Two exist: ``fast.FastReader`` (sqlite3) and ``store.Store`` (SQLAlchemy)."""

    def rows(self, sql: str, parameters: dict[str, Any] | None = None) -> list[tuple[Any, ...]]: ...


class FileStat(NamedTuple):
    """What the file system says about a file; equal size, mtime_ns and inode mean "not touched". ``device`` changes between mounts."""

    size: int
    mtime_ns: int
    inode: int
    device: int
    links: int = 1

    def same(self, other: FileStat) -> bool:
        return self[:3] == other[:3]


class KnownLocation(NamedTuple):
    """A location as the bulk load of a scan sees it."""

    id: int
    artifact_id: int
    root_id: int
    relpath: bytes
    stat: FileStat
    state: str


@dataclass(frozen=True, slots=True)
class RootRecord:
    """A folder that was scanned. ``walked`` is False where single files were named: the rest of the folder stays out."""

    id: int
    path: bytes
    device: int | None
    inode: int | None
    online: bool
    walked: bool = True


@dataclass(frozen=True, slots=True)
class ArtifactRecord:
    """Everything a scan learns about a file's bytes. ``identity`` is the document that ``inspect --json`` prints, deflated."""

    size: int
    format: str
    form: str = "file"
    quick_id: str | None = None
    health: str = "ok"
    kind: str | None = None
    algorithm: str | None = None
    family: str | None = None
    layout: str | None = None
    base_model: str | None = None
    title: str | None = None
    dtypes: tuple[str, ...] = ()
    tensors: int | None = None
    parameters: int | None = None
    rank: int | None = None
    alpha: float | None = None
    search_text: str = ""
    identity: bytes = b""
    trigger_words: tuple[str, ...] = ()
    embedded_hashes: dict[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True)
class LocationRecord:
    """A place where an artifact lies. ``relpath``: exact bytes below the root. ``link``: ``file``, ``symlink`` or ``folder``."""

    root_id: int
    relpath: bytes
    stat: FileStat
    link: str = "file"


@dataclass(frozen=True, slots=True)
class HashResult:
    """Computed hashes of one location, with the stat that held before and after reading."""

    location_id: int
    stat: FileStat
    hashes: dict[str, str]
    content_id: str | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """A location with the exact bytes of its absolute path."""

    id: int
    artifact_id: int
    raw: bytes
    state: str
    size: int
    mtime_ns: int
    link: str = "file"
    verified_at: int | None = None

    @property
    def path(self) -> str:
        """The path as Python opens it: undecodable bytes are lone surrogates."""
        return os.fsdecode(self.raw)


@dataclass(frozen=True, slots=True)
class Row:
    """One artifact as ``ls`` shows it."""

    key: int
    id: str
    title: str | None
    kind: str | None
    algorithm: str | None
    family: str | None
    base_model: str | None
    layout: str | None
    format: str
    size: int
    dtypes: tuple[str, ...]
    rank: int | None
    alpha: float | None
    health: str
    sha256: str | None
    added: int
    places: tuple[Place, ...] = ()
    trigger_words: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        """State of the best place: present before offline before missing."""
        return min((place.state for place in self.places), key=STATES.index, default="missing")


STATES = ("present", "offline", "missing", "trashed", "superseded")
