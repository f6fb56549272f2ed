"""``verify``: hash again what the library has hashed before, and tell what is not the same any more."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from hubtool.actions.scan import Progress, silent
from hubtool.actions.scan_hash import Hashed, hash_place
from hubtool.registry import browse, hashing
from hubtool.registry.records import Place
from hubtool.registry.store import Store

BAD = ("mismatch", "missing", "unreadable")


@dataclass(frozen=True, slots=True)
class Verdict:
    """``status``: ok, new (hashed for the first time), mismatch, missing, unreadable, changed (size or time differ: scan) or offline."""

    path: str
    status: str
    message: str = ""
    expected: str | None = None
    found: str | None = None

    @property
    def bad(self) -> bool:
        return self.status in BAD

    def to_json(self) -> dict[str, Any]:
        """One row of ``verify --json``."""
        return {
            "path": self.path,
            "status": self.status,
            "message": self.message,
            "expected": self.expected,
            "found": self.found,
        }


def verify(
    store: Store, refs: Sequence[str] = (), *, workers: int | None = None, progress: Progress = silent
) -> Iterator[Verdict]:
    """Re-hash the locations of ``refs`` (none: every present one) and compare with the hashes in the library.

    A mismatch becomes a finding of the location; the artifact keeps the hash it had. Raises NotFound, AmbiguousRef, LibraryLocked.
    """
    places = _places(store, refs)
    threads = max(1, workers or min(4, os.cpu_count() or 1))
    pool = ThreadPoolExecutor(threads, "verify")
    try:
        with progress("verifying", sum(place.size for place in places)) as advance:
            for place, hashed in zip(places, pool.map(_hash, places), strict=True):
                advance(place.size)
                yield _judge(store, place, hashed)
    finally:
        pool.shutdown(cancel_futures=True)


def _places(store: Store, refs: Sequence[str]) -> list[Place]:
    if not refs:
        return browse.places(store)
    rows = [browse.find(store, ref) for ref in refs]
    return [place for row in {row.key: row for row in rows}.values() for place in row.places]


def _hash(place: Place) -> Hashed | None:
    return hash_place(place) if place.state == "present" and os.path.lexists(place.raw) else None


def _judge(store: Store, place: Place, hashed: Hashed | None) -> Verdict:
    if hashed is None:
        status = "missing" if place.state == "present" else place.state
        return Verdict(place.path, status, "the file is not there" if status == "missing" else f"the file is {status}")
    known = browse.hashes(store, place.artifact_id).get("computed", {})
    if hashed.result is None:
        return _unread(store, place, hashed.problem or "", known)
    name = next(iter(hashed.result.hashes.keys() & {"sha256", "tree_sha256"}))
    found, expected = hashed.result.hashes[name], known.get(name)
    if expected is not None and found != expected:
        hashing.problem(store, place.id, "hash-mismatch", f"{name} is {found}, the library has {expected}")
        return Verdict(place.path, "mismatch", "the bytes are not those that were hashed before", expected, found)
    hashing.problem(store, place.id, "", "")
    if not all(hashing.record(store, [hashed.result])):
        return Verdict(place.path, "changed", "size or time differ from the last scan; hubtool scan", expected, found)
    return Verdict(place.path, "ok" if expected else "new", "", expected, found)


def _unread(store: Store, place: Place, message: str, known: dict[str, str]) -> Verdict:
    """A file that cannot be read. One that never had a hash was broken when it was scanned: nothing new, but still bad."""
    expected = known.get("sha256") or known.get("tree_sha256")
    if expected:
        hashing.problem(store, place.id, "unreadable", message)
    return Verdict(place.path, "unreadable", message, expected)
