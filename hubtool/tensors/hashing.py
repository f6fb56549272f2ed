"""Every hash a hub knows a file by, from one read of it; and the hash of tensors that no container or layout changes.

Definitions: SHA256 is Hugging Face's LFS oid; AutoV1, AutoV2 and AutoV3, BLAKE3 and CRC32 are Civitai's (its model scanner);
AutoV1 and AutoV2 are also what A1111 writes into pictures, AutoV3 is the head of kohya's ``sshs_model_hash``.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol

from hubtool.tensors.evaluate import chunks
from hubtool.tensors.expr import Expr, size
from hubtool.tensors.header import MAX_HEADER
from hubtool.tensors.reading import Sources, pread_exact, pread_into

ALL = ("sha256", "payload_sha256", "autov1", "autov2", "autov3", "crc32", "blake3")
_BUFFER = 1 << 20  # stays in a core's cache between the hashes of a lane
_BUFFERS = 6
_THREADS_FROM = 8 << 20
# What must be computed for what is asked, and the two lanes that share the work: SHA-256 twice is most of it.
_BASE = {"autov2": "sha256", "autov3": "payload_sha256"}
_LANES = (frozenset({"sha256", "crc32"}), frozenset({"payload_sha256", "blake3"}))
_AUTOV1 = (0x100000, 0x10000)
_AUTOV1_FROM = 2 << 20
_CONTENT_MAGIC = b"hubtool content_id 1\n"


Progress = Callable[[int], None] | None


class Digest(Protocol):
    def update(self, data: Any, /) -> Any: ...

    def hexdigest(self) -> str: ...


def hash_file(path: str | Path, algorithms: Iterable[str] = ALL, progress: Progress = None) -> dict[str, str]:
    """Hashes of a file by name, read once, hashed by two threads. ``progress`` is called with the bytes just read.

    - ``sha256``: all bytes. ``autov2``: its first 10 digits.
    - ``payload_sha256``: the bytes after a safetensors header, so that editing metadata leaves it. ``autov3``: its first 12 digits.
      Absent for other files.
    - ``autov1``: SHA-256 of 64 KiB at offset 1 MiB, 8 digits. Absent below 2 MiB, as at Civitai.
    - ``crc32``: IEEE, in the byte order in which Civitai prints it (little-endian).
    - ``blake3``: all bytes. Absent when the package is not installed.

    All are lower-case hexadecimal.

    Raises ``FileMissing``, ``FileError``, and ``CorruptFile`` when the file changes meanwhile; ``ValueError`` for an unknown name.
    """
    wanted = list(algorithms)
    if unknown := set(wanted) - set(ALL):
        raise ValueError(f"no such hash: {', '.join(sorted(unknown))}")
    path = Path(path)
    with Sources() as sources:
        fd = sources.fd(path)
        found = _hash(path, fd, {_BASE.get(name, name) for name in wanted}, progress)
    found["autov2"] = found.get("sha256", "")[:10]
    found["autov3"] = found.get("payload_sha256", "")[:12]
    return {name: found[name] for name in wanted if found.get(name)}


def content_id(items: Iterable[tuple[str, str, Expr]]) -> str:
    """Hash of a set of tensors, whatever their order: (canonical path, role, tensor) in any order.

    Exactly: the item digest is the SHA-256 of, one after another, path, role and dtype (each UTF-8, preceded by its byte length as
    u32), the number of dimensions as u32, each dimension as u64, the byte length of the data as u64, and the data, row-major and
    little-endian; all integers little-endian. The result is the SHA-256 of ``hubtool content_id 1`` + newline + the item digests
    (32 bytes each) in ascending order, as lower-case hexadecimal.
    """
    with Sources() as sources:
        digests = sorted(_item(path, role, expr, sources) for path, role, expr in items)
    return hashlib.sha256(_CONTENT_MAGIC + b"".join(digests)).hexdigest()


def _item(path: str, role: str, expr: Expr, sources: Sources) -> bytes:
    head = b"".join(struct.pack("<I", len(text)) + text for text in (path.encode(), role.encode(), expr.dtype.encode()))
    shape = struct.pack(f"<I{len(expr.shape)}Q", len(expr.shape), *expr.shape)
    digest = hashlib.sha256(head + shape + struct.pack("<Q", size(expr)))
    for chunk in chunks(expr, sources):
        digest.update(chunk)
    return digest.digest()


class _Crc32:
    """CRC-32 with the interface of hashlib and the byte order of Civitai."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: memoryview) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return self._value.to_bytes(4, "little").hex()


class _Payload:
    """SHA-256 of everything after the first ``skip`` bytes."""

    def __init__(self, skip: int) -> None:
        self._skip = skip
        self._digest = hashlib.sha256()

    def update(self, data: memoryview) -> None:
        self._digest.update(data[self._skip :])
        self._skip = max(0, self._skip - len(data))

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _hash(path: Path, fd: int, names: set[str], progress: Progress) -> dict[str, str]:
    total = os.fstat(fd).st_size
    lanes = [[(name, digest) for name in lane & names if (digest := _digest(name, fd, total))] for lane in _LANES]
    busy = [[digest for _, digest in lane] for lane in lanes if lane]
    if busy:
        # one lane alone is faster where the bytes have just been read: in this core's cache
        feed = _feed_threads if total >= _THREADS_FROM and len(busy) > 1 else _feed
        feed(busy, _Blocks(path, fd, total, progress))
    found = {name: digest.hexdigest() for lane in lanes for name, digest in lane}
    if "autov1" in names and total >= _AUTOV1_FROM:
        offset, length = _AUTOV1
        found["autov1"] = hashlib.sha256(pread_exact(fd, length, offset, path)).hexdigest()[:8]
    return found


def _digest(name: str, fd: int, total: int) -> Digest | None:
    if name == "sha256":
        return hashlib.sha256()
    if name == "crc32":
        return _Crc32()
    if name == "payload_sha256":
        start = _payload_start(os.pread(fd, 9, 0), total)
        return None if start is None else _Payload(start)
    return _blake3()


def _payload_start(head: bytes, total: int) -> int | None:
    length = int.from_bytes(head[:8], "little")
    plausible = 2 <= length <= min(MAX_HEADER, total - 8) and head[8:] in (b"{", b" ", b"\n", b"\t", b"\r")
    return 8 + length if plausible else None


def _blake3() -> Digest | None:
    try:
        import blake3
    except ImportError:
        return None
    digest: Digest = blake3.blake3()
    return digest


class _Blocks:
    """The file in pieces of 1 MiB, read into a few buffers in turn: one is filled while the others are hashed."""

    def __init__(self, path: Path, fd: int, total: int, progress: Progress) -> None:
        self._file = (path, fd, total)
        self._progress = progress

    def __iter__(self) -> Iterator[memoryview]:
        path, fd, total = self._file
        buffers = [memoryview(bytearray(min(_BUFFER, total))) for _ in range(_BUFFERS)]
        for at, buffer in zip(range(0, total, _BUFFER), cycle(buffers), strict=False):
            view = buffer[: min(_BUFFER, total - at)]
            pread_into(fd, view, at, path)
            yield view
            if self._progress is not None:
                self._progress(len(view))


def _update(lane: list[Digest], block: memoryview) -> None:
    for digest in lane:
        digest.update(block)


def _feed(lanes: list[list[Digest]], blocks: Iterable[memoryview]) -> None:
    for block in blocks:
        for lane in lanes:
            _update(lane, block)


def _feed_threads(lanes: list[list[Digest]], blocks: Iterable[memoryview]) -> None:
    # the digests release the GIL; one thread for each lane keeps its blocks in order
    pools = [ThreadPoolExecutor(1) for _ in lanes]
    pending: deque[list[Future[None]]] = deque()
    try:
        for block in blocks:
            pending.append([pool.submit(_update, lane, block) for pool, lane in zip(pools, lanes, strict=True)])
            if len(pending) == _BUFFERS:
                _wait(pending.popleft())  # its buffer is filled next
        for futures in pending:
            _wait(futures)
    finally:
        for pool in pools:
            pool.shutdown()


def _wait(futures: list[Future[None]]) -> None:
    for future in futures:
        future.result()
