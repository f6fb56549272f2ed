"""Full hashes behind the scan: small files first, committed every half second, so that Ctrl-C costs next to nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from hubtool.actions.scan_record import stat_now
from hubtool.actions.trees import tree_sha256
from hubtool.errors import HubtoolError
from hubtool.formats.base import TensorFile
from hubtool.registry import hashing
from hubtool.registry.columns import signed
from hubtool.registry.records import FileStat, HashResult, Place
from hubtool.registry.store import Store

_PAGE = 64
_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Hashed:
    """What came of hashing one place: a result, or why there is none."""

    place: Place
    result: HashResult | None = None
    problem: str | None = None


def hash_queued(store: Store, workers: int, advance: Callable[[int], None]) -> Iterator[Hashed]:
    """Hash every location that waits for it; a result is in the library before it is yielded."""
    after = (-1, 0)
    pool = ThreadPoolExecutor(workers, "hash")
    try:
        while page := hashing.queue(store, after, limit=_PAGE):
            after = (page[-1].size, page[-1].id)
            for done in _in_batches(pool.map(hash_place, page)):
                yield from _stored(store, done)
                advance(sum(each.place.size for each in done))
    finally:
        pool.shutdown(cancel_futures=True)


def _in_batches(results: Iterable[Hashed]) -> Iterator[list[Hashed]]:
    """Many small files share a transaction, a large one has its own."""
    batch: list[Hashed] = []
    started = time.monotonic()
    for done in results:
        batch.append(done)
        if time.monotonic() - started > _SECONDS:
            yield batch
            batch, started = [], time.monotonic()
    if batch:
        yield batch


def _stored(store: Store, batch: list[Hashed]) -> Iterator[Hashed]:
    results = [done.result for done in batch if done.result is not None]
    kept = iter(hashing.record(store, results))
    for done in batch:
        lost = done.result is not None and not next(kept)
        yield Hashed(done.place, problem="changed while it was hashed; the next scan tries again") if lost else done


def hash_place(place: Place) -> Hashed:
    """Hash one location. A file that changes meanwhile has no hash."""
    before = stat_now(place.raw)
    if before is None:
        return Hashed(place, problem="vanished before it was hashed")
    try:
        hashes, content = compute(place)
    except (HubtoolError, OSError) as error:
        return Hashed(place, problem=str(error))
    now = stat_now(place.raw)
    if now is None or not now.same(before):
        return Hashed(place, problem="is changing; skipped")
    return Hashed(place, HashResult(place.id, _kept(before), hashes, content))


def _kept(stat: FileStat) -> FileStat:
    return signed(stat)


def compute(place: Place) -> tuple[dict[str, str], str | None]:
    """(hashes by name, content_id) of what lies at a place. A folder or sharded file has ``tree_sha256`` instead of ``sha256``.

    A broken file has hashes like any other: they tell it from its copies, and ``verify`` needs them. Raises FileError and OSError.
    """
    from hubtool.formats import open_file
    from hubtool.tensors.hashing import hash_file

    if place.link == "folder" or place.path.endswith(".index.json"):
        file = open_file(place.path)
        base = place.raw if place.link == "folder" else os.path.dirname(place.raw)
        return {"tree_sha256": tree_sha256(file, base)}, _content_id(file)
    hashes = hash_file(place.path)
    try:
        return hashes, _content_id(open_file(place.path))
    except HubtoolError:
        return hashes, None


def _content_id(file: TensorFile) -> str | None:
    from hubtool.layouts.content import content_id

    return content_id(file)
