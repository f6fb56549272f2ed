"""``scan``: bring the library up to date with the disk. Stats first, headers of what is new or changed, full hashes last.

Interrupted anywhere, the library is consistent and the next scan goes on: every batch and every hash is a transaction of its own,
and nothing is read or hashed inside one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from hubtool.actions.scan_hash import hash_queued
from hubtool.actions.scan_plan import Difference, compare, plan
from hubtool.actions.scan_record import Described, describe
from hubtool.actions.scan_walk import Candidate
from hubtool.registry import hashing, scanning, settings
from hubtool.registry.columns import batches, signed
from hubtool.registry.records import FileStat, KnownLocation, LocationRecord
from hubtool.registry.store import Store
from hubtool.registry.text import display
from hubtool.registry.writing import NewFile, write

Advance = Callable[[int], None]
Progress = Callable[[str, int | None], AbstractContextManager[Advance]]
_PARSED = 200  # files parsed per transaction: what Ctrl-C may cost
Fresh = tuple[Candidate, KnownLocation | None]


@dataclass(slots=True)
class ScanResult:
    """Counts of a scan. ``problems``: files that are broken or could not be read or hashed; ``failed``: arguments that were not."""

    added: int = 0
    changed: int = 0
    moved: int = 0
    missing: int = 0
    unchanged: int = 0
    hashed: int = 0
    offline: list[str] = field(default_factory=list)
    problems: list[dict[str, str]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The document of ``scan --json``."""
        names = ("added", "changed", "moved", "missing", "unchanged", "hashed")
        counts: dict[str, Any] = {name: getattr(self, name) for name in names}
        return {
            **counts,
            "problems": len(self.problems),
            "problem_list": self.problems,
            "offline": self.offline,
            "failed": self.failed,
        }

    def problem(self, path: bytes, message: str) -> None:
        self.problems.append({"path": os.fsdecode(path), "message": message})


@contextmanager
def silent(description: str, total: int | None = None) -> Iterator[Advance]:
    """A progress display that shows nothing."""
    yield lambda _n: None


def scan(
    store: Store, paths: Sequence[str] = (), *, hashes: bool = True, workers: int | None = None, accept_missing: bool = False,
    progress: Progress = silent,
) -> ScanResult:  # fmt: skip
    """Index ``paths`` (none: every known root).

    ``hashes``: compute full hashes of what has none. ``workers``: threads for reading and hashing. ``accept_missing``: believe that a
    root that lost most of its files really did, instead of taking it for an unmounted disk. Raises LibraryLocked.
    """
    scopes, failed = plan(store, paths)
    result = ScanResult(failed=failed)
    threads = max(1, workers or min(4, os.cpu_count() or 1))
    forbidden = settings.file_ids(store.path) if store.path else set()
    with progress("looking", None) as advance:
        found = []
        for scope in scopes:
            found.append(compare(store, scope, forbidden, accept_missing=accept_missing))
            advance(len(found[-1].fresh) + len(found[-1].unchanged))
    online = _settle_roots(store, found, result)
    fresh = _moves(store, online, result)
    gone = _settle_rows(store, online, result)
    _index(store, fresh, threads, result, progress)
    result.missing = scanning.count_missing(store, gone)
    for each in online:
        if not each.scope.below:
            status = os.stat(each.scope.root.path)
            scanning.finish_root(store, each.scope.root.id, status.st_dev, status.st_ino)
    if hashes:
        _hash(store, threads, result, progress)
    return result


def _settle_roots(store: Store, found: Sequence[Difference], result: ScanResult) -> list[Difference]:
    """Take offline what is not there; the rest."""
    for each in found:
        for folder in each.failed:
            result.problem(
                os.path.join(each.scope.root.path, folder), "the folder cannot be listed; what is in it stays as it was"
            )
        if each.offline:
            scanning.take_offline(store, each.scope.root.id)
            result.offline.append(display(each.scope.root.path))
    return [each for each in found if not each.offline]


def _moves(store: Store, found: Sequence[Difference], result: ScanResult) -> list[tuple[int, Fresh]]:
    """Give renamed files (same inode, size and time elsewhere) their new path; (root, file) pairs that are left to read."""
    displaced: dict[FileStat, KnownLocation] = {}
    for each in found:
        rows = [*each.gone, *(row for _, row in each.fresh if row is not None)]
        displaced.update({_key(row.stat): row for row in rows})
    pairs, left = [], []
    for each in found:
        for file, row in each.fresh:
            old = displaced.pop(_key(signed(file.stat)), None)
            if old is None:
                left.append((each.scope.root.id, (file, row)))
            else:
                pairs.append((old, LocationRecord(each.scope.root.id, file.relpath, file.stat, file.link)))
    scanning.move(store, pairs)
    result.moved += len(pairs)
    moved = {old.id for old, _ in pairs}
    for each in found:
        each.gone = [row for row in each.gone if row.id not in moved]
    return [(root, (file, None if row is not None and row.id in moved else row)) for root, (file, row) in left]


def _key(stat: FileStat) -> FileStat:
    # A rename keeps size, time and inode. The device number may differ after a reboot, the number of links at any time.
    return FileStat(stat.size, stat.mtime_ns, stat.inode, 0)


def _settle_rows(store: Store, found: Sequence[Difference], result: ScanResult) -> list[int]:
    """Mark rows missing or present again; the ids of those that have gone. Done before reading, so that moved files find their row."""
    gone = [row.id for each in found for row in each.gone]
    scanning.set_states(store, gone, "missing")
    back = [row for each in found for row in each.unchanged if row.state != "present"]
    scanning.set_states(store, [row.id for row in back], "present")
    returned = sum(row.state == "missing" for row in back)
    result.added += returned
    result.unchanged += sum(len(each.unchanged) for each in found) - returned
    return gone


def _index(
    store: Store, fresh: Sequence[tuple[int, Fresh]], threads: int, result: ScanResult, progress: Progress
) -> None:
    """Read and write new and changed files, a batch at a time."""
    known = scanning.quick_ids(store, [row.artifact_id for _, (_, row) in fresh if row is not None])
    with progress("reading", len(fresh)) as advance, _readers(threads) as read:
        for batch in batches(fresh, _PARSED):
            described = list(read([file for _, (file, _) in batch]))
            _write(store, batch, described, known, result)
            advance(len(batch))


@contextmanager
def _readers(threads: int) -> Iterator[Callable[[list[Candidate]], Iterator[Described]]]:
    if threads == 1:
        yield lambda files: map(describe, files)
        return
    pool = ThreadPoolExecutor(threads, "scan")
    try:
        yield lambda files: pool.map(describe, files)
    finally:
        pool.shutdown(cancel_futures=True)


def _write(
    store: Store,
    batch: Sequence[tuple[int, Fresh]],
    described: Sequence[Described],
    known: dict[int, str | None],
    result: ScanResult,
) -> None:
    touched, new = [], []
    for (root_id, (_, row)), done in zip(batch, described, strict=True):
        file, record = done.candidate, done.record
        if done.problem:
            result.problem(file.path, done.problem)
        if record is None:
            continue
        if row is not None and record.quick_id is not None and known.get(row.artifact_id) == record.quick_id:
            touched.append((row, file.stat))
        else:
            new.append(NewFile(LocationRecord(root_id, file.relpath, file.stat, file.link), record))
    scanning.touch(store, touched)
    result.unchanged += len(touched)
    for outcome in write(store, new) if new else ():
        setattr(result, outcome, getattr(result, outcome) + 1)


def _hash(store: Store, threads: int, result: ScanResult, progress: Progress) -> None:
    _, total = hashing.queued_bytes(store)
    with progress("hashing", total) as advance:
        for done in hash_queued(store, threads, advance):
            if done.problem:
                result.problem(done.place.raw, done.problem)
            else:
                result.hashed += 1
