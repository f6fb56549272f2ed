"""How a publication is asked for, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubtool.hub.uploads import Change
from hubtool.types import Finding


@dataclass(frozen=True, slots=True)
class Options:
    """How a publication is carried out. ``public``: only for a repository that is made now. ``offline``: plan against the last receipt.

    ``keep_metadata``: publish paths and user names as they are (secrets never). ``drop_metadata``: keys to leave out. ``prune``: delete
    what an earlier publication put there and this one does not have. ``permitted``: publish what its permissions on Civitai forbid.
    ``try_base``: a pipeline folder with which the card's snippet is run first.
    """

    public: bool = False
    pull_request: bool = False
    dry_run: bool = False
    offline: bool = False
    revision: str = "main"
    message: str | None = None
    keep_metadata: bool = False
    drop_metadata: tuple[str, ...] = ()
    keep_original: bool = False
    layouts: tuple[str, ...] = ()
    previews: tuple[Path, ...] = ()
    prune: bool = False
    permitted: bool = False
    try_base: Path | None = None
    library: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What was or would be done. ``commit`` is None for a dry run; ``refused``: why this would not be published."""

    repo: str
    endpoint: str
    changes: tuple[Change, ...]
    findings: tuple[Finding, ...]
    card_diff: str
    kept: tuple[str, ...] = ()
    commit: str | None = None
    created: bool = False
    pull_request: str | None = None
    visibility: str | None = None
    basis: str = "hub"
    warnings: tuple[str, ...] = ()

    @property
    def refused(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def url(self) -> str:
        return self.pull_request or f"{self.endpoint}/{self.repo}"

    def to_json(self) -> dict[str, Any]:
        return {
            "repo": self.repo,
            "url": self.url,
            "commit": self.commit,
            "created": self.created,
            "pull_request": self.pull_request,
            "visibility": self.visibility,
            "basis": self.basis,
            "changes": [change.to_json() for change in self.changes],
            "card_diff": self.card_diff,
            "card_kept": list(self.kept),
            "findings": [finding.to_json() for finding in self.findings],
            "warnings": list(self.warnings),
        }
