"""Which part of which root a scan looks at, and what the file system says compared with the library."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hubtool.actions.scan_walk import Candidate, Inode, candidate, is_bundle, walk
from hubtool.registry import scanning
from hubtool.registry.columns import signed
from hubtool.registry.records import KnownLocation, RootRecord
from hubtool.registry.store import Store
from hubtool.registry.text import raw_path, signed64

_FEW = 20  # in a folder of so few files, losing most of them says nothing
_LEFT = 0.2  # of more, a fifth must be there, or the disk is taken for another one


@dataclass(frozen=True, slots=True)
class Scope:
    """A part of a root: everything (``below`` empty), a folder, or one file or bundle (``single``)."""

    root: RootRecord
    below: bytes = b""
    single: bool = False

    @property
    def path(self) -> bytes:
        return os.path.join(self.root.path, self.below) if self.below else self.root.path

    def covers(self, relpath: bytes) -> bool:
        """Whether a location of the root lies in this part."""
        if self.single:
            return relpath == self.below
        return not self.below or relpath.startswith(self.below + b"/")


@dataclass(slots=True)
class Difference:
    """One scope, compared. ``fresh``: new or changed files with the row that held their path. ``gone``: rows without a file."""

    scope: Scope
    unchanged: list[KnownLocation] = field(default_factory=list)
    fresh: list[tuple[Candidate, KnownLocation | None]] = field(default_factory=list)
    gone: list[KnownLocation] = field(default_factory=list)
    offline: bool = False
    failed: list[bytes] = field(default_factory=list)


def plan(store: Store, paths: Sequence[str]) -> tuple[list[Scope], list[str]]:
    """(what to scan, paths that cannot be read). Without paths: every root. New folders become roots."""
    if not paths:
        return [Scope(root) for root in scanning.roots(store)], []
    scopes: list[Scope] = []
    failed = []
    for path in dict.fromkeys(paths):
        scope = _scope(store, raw_path(os.path.abspath(path)))
        if scope is None:
            failed.append(path)
        else:
            scopes += [each for each in (scope, *_inner(store, scope)) if each not in scopes]
    return scopes, failed


def _scope(store: Store, path: bytes) -> Scope | None:
    kind = _kind(path)
    roots = scanning.roots(store)
    if kind == "folder":
        return _folder_scope(store, path, roots)
    holder = _holder(path, roots)
    if kind == "single":
        parent, name = os.path.split(path)
        if holder is None:
            status = os.stat(parent)
            holder = scanning.add_root(store, parent, status.st_dev, status.st_ino, walked=False)
            return Scope(holder, name, single=True)
        return Scope(holder, _relative(path, holder), single=True)
    exact = next((root for root in roots if root.path == path), None)
    if exact is not None:
        return Scope(exact)
    if holder is None or kind == "other":
        return None
    inner = _relative(path, holder)
    rows = scanning.known(store, holder.id)
    if any(row.relpath == inner for row in rows):
        return Scope(holder, inner, single=True)
    return Scope(holder, inner) if any(row.relpath.startswith(inner + b"/") for row in rows) else None


def _kind(path: bytes) -> str:
    """``folder``, ``single`` (a file, or a folder that is one artifact), ``absent`` or ``other`` (a device, an unreadable folder)."""
    try:
        status = os.stat(path)
    except OSError:
        return "absent"
    if stat.S_ISREG(status.st_mode):
        return "single"
    if not stat.S_ISDIR(status.st_mode):
        return "other"
    if is_bundle(path):
        return "single"
    return "folder" if _listable(path) else "absent"


def _listable(path: bytes) -> bool:
    try:
        with os.scandir(path):
            return True
    except OSError:
        return False


def _folder_scope(store: Store, path: bytes, roots: Sequence[RootRecord]) -> Scope:
    walked = _holder(path + b"/", [root for root in roots if root.walked])
    if walked is not None:
        return Scope(walked, _relative(path, walked))
    status = os.stat(path)
    root = scanning.add_root(store, path, status.st_dev, status.st_ino)
    scanning.absorb(store, root)
    return Scope(root)


def _holder(path: bytes, roots: Sequence[RootRecord]) -> RootRecord | None:
    """The innermost root that holds ``path``."""
    holding = [root for root in roots if path.startswith(root.path.rstrip(b"/") + b"/")]
    return max(holding, key=lambda root: len(root.path), default=None)


def _relative(path: bytes, root: RootRecord) -> bytes:
    return path[len(root.path.rstrip(b"/")) + 1 :]


def _inner(store: Store, scope: Scope) -> Iterator[Scope]:
    """Roots inside a scope: they are scanned with it, but as themselves."""
    if scope.single:
        return
    inside = scope.path.rstrip(b"/") + b"/"
    for root in scanning.roots(store):
        if root.walked and root.id != scope.root.id and root.path.startswith(inside):
            yield Scope(root)


def compare(store: Store, scope: Scope, forbidden: set[Inode], *, accept_missing: bool = False) -> Difference:
    """Look at the files of a scope and tell what differs from the library. Opens no file."""
    known = [row for row in scanning.known(store, scope.root.id) if scope.covers(row.relpath)]
    result = Difference(scope)
    if not _listable(scope.root.path):
        result.offline = True
        return result
    found = _candidates(store, scope, known, forbidden, result)
    by_path = {row.relpath: row for row in known if row.state != "missing"}
    lost = {row.relpath: row for row in known if row.state == "missing"}
    for each in found:
        row = by_path.pop(each.relpath, None) or _returned(lost, each)
        if row is not None and row.stat.same(signed(each.stat)):
            result.unchanged.append(row)
        else:
            result.fresh.append((each, row))
    unknown = tuple(folder + b"/" for folder in result.failed)
    result.gone = (
        [row for path, row in by_path.items() if not path.startswith(unknown)] if b"" not in result.failed else []
    )
    result.offline = not accept_missing and _is_offline(scope, len(by_path), len(found), result)
    return result


def _returned(lost: dict[bytes, KnownLocation], found: Candidate) -> KnownLocation | None:
    """The missing row of this path, if the very same file is back."""
    row = lost.get(found.relpath)
    return row if row is not None and row.stat.same(signed(found.stat)) else None


def _candidates(
    store: Store, scope: Scope, known: Sequence[KnownLocation], forbidden: set[Inode], result: Difference
) -> list[Candidate]:
    root = scope.root.path
    if scope.single or not scope.root.walked:
        names = [scope.below] if scope.single else [row.relpath for row in known]
        found = [candidate(root, name) for name in names]
        return [each for each in found if each is not None and (each.stat.device, each.stat.inode) not in forbidden]
    prune = {other.path for other in scanning.roots(store) if other.walked and other.id != scope.root.id}
    walked = walk(root, scope.below, prune=prune, forbidden=forbidden)
    result.failed = walked.failed
    return walked.found


def _is_offline(scope: Scope, unseen: int, found: int, result: Difference) -> bool:
    """Whether another disk, or an empty mount point, lies where the root was: then nothing is said about its files."""
    total = len(result.unchanged) + unseen
    if scope.below or not result.gone:
        return False
    status = os.stat(scope.root.path)
    marker = (signed64(status.st_dev), signed64(status.st_ino))
    if not found and marker != (scope.root.device, scope.root.inode):
        return True
    return total > _FEW and found < _LEFT * total
