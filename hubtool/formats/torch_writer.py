"""Writes torch zip files (``.pt``, ``.bin``, ``.ckpt``) without torch: stored, 64-byte aligned, streamed, atomic.

Layout as torch 2.7 and later writes it (spec/artefacts C.1): local headers carry no size and no checksum, data descriptors and
the central directory do. Tensors that are bytes of files are checked and written in one pass. Where some have to be computed, every entry's
place is planned (stored entries are as long as their tensors) and several threads fill them; the checksums are then taken of what was written.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubtool.errors import ConversionError, UsageProblem
from hubtool.formats.pickle_emitter import Emitter
from hubtool.tensors.atomic import Output, atomic_file
from hubtool.tensors.evaluate import chunks, is_bytes
from hubtool.tensors.expr import Expr, Literal, size
from hubtool.tensors.jobs import Placed
from hubtool.tensors.progress import Progress
from hubtool.tensors.reading import pread_into

ALIGNMENT = 64
_FLAGS = 0x0808  # data descriptor, UTF-8 names
_DATE = 0x21  # 1 January 1980: the same bytes on every day
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # what a field says whose number is in the zip64 part
_LIMIT = 0xFFFFFFFF  # numbers from here on go to the zip64 part
_CHUNK = 4 << 20  # bytes that are checked at a time


@dataclass(frozen=True, slots=True)
class _Member:
    """An entry with its place: ``head`` is the local header, ``size`` the payload, ``start`` where ``head`` begins; ``key`` as people know it."""

    key: str
    name: bytes
    body: Expr
    size: int
    start: int
    head: bytes

    @property
    def wide(self) -> bool:
        return self.size >= _LIMIT

    @property
    def data(self) -> int:
        """Where the payload begins."""
        return self.start + len(self.head)

    @property
    def end(self) -> int:
        return self.data + self.size + (24 if self.wide else 16)

    def descriptor(self, crc: int) -> bytes:
        return struct.pack("<4sL2Q" if self.wide else "<4s3L", b"PK\x07\x08", crc, self.size, self.size)


def write_torch_zip(
    path: Path,
    obj: Any,
    *,
    force: bool = False,
    root: str = "archive",
    workers: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> int:
    """Write ``obj`` as ``torch.save`` would, readable by ``torch.load(weights_only=True)``; returns the bytes written.

    ``obj``: nested dict (``OrderedDict`` stays one), list, tuple, str, int, float, bool and ``None`` with tensor expressions as
    leaves. ``Read``s of the same bytes stay tied. ``workers``, ``device`` and ``progress`` as in ``write_safetensors_parallel``; the bytes
    do not depend on them. Nothing appears unless all of it does. Raises ``ConversionError`` for anything else in ``obj``,
    ``WouldOverwrite``, ``FileError``, and what reading and computing the tensors raises.
    """
    if not root or root.strip(".") == "" or set(root) & set("/\\:") or not root.isprintable():
        raise UsageProblem(f"{root!r} cannot be the root folder of a torch file")
    members = _placed(_records(obj, root, path))
    directory_size = sum(len(_central(member, 0)) for member in members)
    start = members[-1].end
    total = start + directory_size + len(_trailer(len(members), directory_size, start))
    with atomic_file(path, total, force=force) as out:
        if all(is_bytes(member.body) for member in members):
            sums = [_write(out, member, progress) for member in members]
        else:
            sums = _write_in_parallel(out, members, workers, device, progress)
        out.write(b"".join(map(_central, members, sums)))
        out.write(_trailer(len(members), directory_size, start))
    return total


def _records(obj: Any, root: str, path: Path) -> Iterator[tuple[str, str, Expr]]:
    """Keys, names and contents in torch's order."""
    emitter = Emitter()
    try:
        emitter.value(obj)
    except ConversionError as error:
        error.path = str(path)
        raise
    yield "data.pkl", f"{root}/data.pkl", _bytes(bytes(emitter.out) + b".")
    for name, text in ((".format_version", b"1"), (".storage_alignment", b"64"), ("byteorder", b"little")):
        yield name, f"{root}/{name}", _bytes(text)
    rows = zip(emitter.names, emitter.storages, strict=True)
    yield from ((key, f"{root}/data/{i}", expr) for i, (key, expr) in enumerate(rows))
    yield "version", f"{root}/version", _bytes(b"3\n")


def _bytes(data: bytes) -> Expr:
    return Literal(data, "U8", (len(data),))


def _placed(records: Iterable[tuple[str, str, Expr]]) -> list[_Member]:
    at, members = 0, []
    for key, name, body in records:
        raw = name.encode()
        member = _Member(key, raw, body, size(body), at, _local(raw, at, size(body)))
        members.append(member)
        at = member.end
    return members


def _local(name: bytes, start: int, count: int) -> bytes:
    """A local header whose padding field puts the payload on a multiple of 64."""
    wide = count >= _LIMIT
    extra = struct.pack("<2H2Q", 1, 16, 0, 0) if wide else b""
    plain = start + 30 + len(name) + len(extra) + 4
    padding = -plain % ALIGNMENT
    extra += struct.pack("<2H", 0x4246, padding) + b"Z" * padding
    sizes = (_FULL32, _FULL32) if wide else (0, 0)
    header = struct.pack(
        "<4s5H3L2H", b"PK\x03\x04", 45 if wide else 20, _FLAGS, 0, 0, _DATE, 0, *sizes, len(name), len(extra)
    )
    return header + name + extra


def _write(out: Output, member: _Member, progress: Progress | None) -> int:
    """Header, payload and descriptor; returns the checksum."""
    crc = written = 0
    out.write(member.head)
    for chunk in chunks(member.body):
        crc = zlib.crc32(chunk, crc)
        written += len(chunk)
        out.write(chunk)
        if progress is not None:
            progress(len(chunk))
    if written != member.size:
        raise ConversionError(f"{member.key} gave {written} bytes instead of {member.size}")
    out.write(member.descriptor(crc))
    return crc


def _write_in_parallel(
    out: Output, members: Sequence[_Member], workers: int | None, device: str, progress: Progress | None
) -> list[int]:
    """Every entry at its place; returns the checksums. The file goes on behind the last one."""
    from hubtool.tensors.parallel import write_placed
    from hubtool.tensors.places import Target

    placed = [Placed(member.key, member.body, member.data) for member in members]
    write_placed(out, placed, workers=workers, device=device, progress=progress)
    # crc32 runs without the interpreter's lock
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        sums = list(pool.map(lambda member: _checksum(out, member), members))
    rest = Target(out, None)
    for member, crc in zip(members, sums, strict=True):
        rest.write(member.head, member.start)
        rest.write(member.descriptor(crc), member.data + member.size)
    os.lseek(out.fd, members[-1].end, os.SEEK_SET)
    return sums


def _checksum(out: Output, member: _Member) -> int:
    """The CRC-32 of a payload as it lies in the file."""
    buffer, crc = memoryview(bytearray(min(_CHUNK, member.size))), 0
    for start in range(0, member.size, _CHUNK):
        part = buffer[: min(_CHUNK, member.size - start)]
        pread_into(out.fd, part, member.data + start, out.part)
        crc = zlib.crc32(part, crc)
    return crc


def _central(member: _Member, crc: int) -> bytes:
    values = (member.size, member.size, member.start)
    longs = [value for value in values if value >= _LIMIT]
    extra = struct.pack(f"<2H{len(longs)}Q", 1, 8 * len(longs), *longs) if longs else b""
    sizes = [_short(value) for value in values]
    row = struct.pack(
        "<4s6H3L5H2L", b"PK\x01\x02", 45, 45 if longs else 20, _FLAGS, 0, 0, _DATE, crc, *sizes[:2],
        len(member.name), len(extra), 0, 0, 0, 0, sizes[2],
    )  # fmt: skip
    return row + member.name + extra


def _short(value: int) -> int:
    return value if value < _LIMIT else _FULL32


def _trailer(count: int, directory: int, start: int) -> bytes:
    """End of central directory, with the zip64 records before it where a number does not fit."""
    short = (min(count, _FULL16), min(count, _FULL16), _short(directory), _short(start))
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, *short, 0)
    if count < _FULL16 and max(directory, start) < _LIMIT:
        return end
    wide = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, directory, start)
    return wide + struct.pack("<4sLQL", b"PK\x06\x07", 0, start + directory, 1) + end
