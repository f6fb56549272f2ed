"""What a pull is asked for, and what became of every file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubtool.errors import HubtoolError

if TYPE_CHECKING:
    from hubtool.hub.client import Entry
    from hubtool.hub.refs import HubRef


@dataclass(frozen=True, slots=True)
class Options:
    """``output``: the folder to fill; None for ``<root of the library>/owner/name``. ``include``, ``exclude``: patterns of names."""

    output: Path | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    force: bool = False
    dry_run: bool = False
    index: bool = True
    library: str | None = None


@dataclass(slots=True)
class Item:
    """One file. ``how``: download, present, copy (before); present, copied, http, xet, library (after)."""

    entry: Entry
    target: Path
    how: str = "download"
    received: int = 0
    resumed: int = 0
    id: str | None = None
    error: HubtoolError | None = None
    copies: tuple[Path, ...] = ()

    def to_json(self) -> dict[str, Any]:
        entry = self.entry
        facts = {
            "file": entry.path,
            "path": str(self.target),
            "size": entry.size,
            "sha256": entry.sha256,
            "oid": entry.oid,
        }
        done = {"how": self.how, "received": self.received, "resumed": self.resumed, "id": self.id}
        return {**facts, **done, **({"error": self.error.to_json()} if self.error else {})}


@dataclass(slots=True)
class Pulled:
    """What became of one reference. ``left_out``: files of the repository that were not wanted, and why."""

    ref: HubRef
    commit: str
    revision: str
    endpoint: str
    items: list[Item]
    local: bool = False
    left_out: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    card: Mapping[str, Any] = field(default_factory=dict)
    card_entry: Entry | None = None

    @property
    def failed(self) -> list[Item]:
        """Files that did not come."""
        return [item for item in self.items if item.error is not None]

    def to_json(self) -> dict[str, Any]:
        """The document of ``pull --json``."""
        head = {"ref": str(self.ref), "repo": self.ref.repo, "revision": self.revision, "commit": self.commit}
        return {
            **head,
            "endpoint": self.endpoint,
            "local": self.local,
            "received": sum(item.received for item in self.items),
            "files": [item.to_json() for item in self.items],
            "left_out": self.left_out,
            "card": dict(self.card),
            "warnings": self.warnings,
        }
