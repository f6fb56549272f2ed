"""Whether what a library has from a hub, or put there, is still what the hub has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from hubtool.errors import HubError
from hubtool.hub.client import Client, Entry
from hubtool.hub.errors import names_of
from hubtool.hub.refs import HubRef

# What became of a file on the hub. ``gone``: the repository or the revision is no longer there, or closed to this account.
CURRENT, CHANGED, MOVED, DELETED, GONE, UNKNOWN = "current", "changed", "moved", "deleted", "gone", "unknown"
_GONE = frozenset({"RepositoryNotFoundError", "RevisionNotFoundError", "DisabledRepoError"})


@dataclass(frozen=True, slots=True)
class Remote:
    """A repository at a revision, now. ``repo``: its name today. ``files`` is empty where the commit made listing it needless."""

    repo: str
    commit: str
    files: Mapping[str, Entry] = field(default_factory=dict)
    listed: bool = False


class Known(Protocol):
    """What was recorded about a file of a repository: its bytes by SHA256, or by git blob id (``etag``) where it is not in LFS."""

    @property
    def repo(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def sha256(self) -> str | None: ...

    @property
    def etag(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """``status``, and what the hub has instead: the file there now, its commit, and the repository's name today."""

    status: str
    repo: str
    commit: str | None = None
    entry: Entry | None = None
    reason: str | None = None


def look(client: Client, ref: HubRef, commits: Iterable[str]) -> Remote | Verdict:
    """The repository of ``ref`` at its revision now; its files are listed only where some of ``commits`` is not the newest.

    A repository that is gone is a ``Verdict``, and so is a hub that does not answer (``unknown``, with the reason).
    """
    try:
        info = client.ask(ref, lambda: client.api.model_info(ref.repo, revision=ref.revision))
        commit, repo = str(info.sha), str(info.id)
        if set(commits) == {commit}:
            return Remote(repo, commit)
        return Remote(repo, commit, {entry.path: entry for entry in client.tree(ref.at(commit))}, True)
    except HubError as error:
        names = names_of(error.__cause__) if error.__cause__ else frozenset()
        gone = names & _GONE and "GatedRepoError" not in names
        return Verdict(GONE if gone else UNKNOWN, ref.repo, reason=error.message)


def compare(known: Known, remote: Remote) -> Verdict:
    """What became of one file. Bytes decide, not commits: a newer commit with the same bytes is ``current``."""
    renamed = MOVED if remote.repo != known.repo else CURRENT
    if not remote.listed:
        return Verdict(renamed, remote.repo, remote.commit)
    there = remote.files.get(known.path)
    if there is not None:
        return Verdict(renamed if same(known, there) else CHANGED, remote.repo, remote.commit, there)
    elsewhere = next((entry for _, entry in sorted(remote.files.items()) if same(known, entry)), None)
    return Verdict(MOVED if elsewhere else DELETED, remote.repo, remote.commit, elsewhere)


def same(known: Known, entry: Entry) -> bool:
    """Whether a listed file holds the bytes that were recorded."""
    if entry.sha256 is not None:
        return entry.sha256 == known.sha256
    return bool(entry.oid) and entry.oid == known.etag
