"""A strict ZIP reader: the directory and the local headers must tell one story, and members must tile the file.

Any two readers of an archive that passes see the same members and the same bytes; that is what spec/security 3 (#6, #8) and 5.3
ask for. Field layout: PKWARE APPNOTE 6.3.10. What torch writes: spec/artefacts C.1.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from hubtool.errors import CorruptFile, UnsafeFile
from hubtool.formats.source import Source

STORED, DEFLATED = 0, 8
MAX_DIRECTORY = 64 << 20
MAX_RATIO = 100
MAX_MEMBERS = 100_000
_EOCD = struct.Struct("<4s4H2LH")
_EOCD64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_DESCRIPTOR_FLAG = 0x0008
_ALLOWED_FLAGS = 0x0808
_MAX_VERSION = 63
_FULL32 = 0xFFFFFFFF
_TAIL = 256 << 10


@dataclass(frozen=True, slots=True)
class Member:
    """One entry: ``start`` is where its payload begins in the file; ``stored`` and ``size`` are bytes there and once inflated."""

    name: str
    method: int
    crc: int
    stored: int
    size: int
    start: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """A row of the central directory."""

    raw_name: bytes
    flags: int
    method: int
    crc: int
    stored: int
    size: int
    offset: int


def members(source: Source) -> dict[str, Member]:
    """Every member by name, in directory order, after checking that directory, local headers and file agree.

    Raises ``CorruptFile`` (truncated, damaged) or ``UnsafeFile`` (readers of this archive would disagree).
    """
    count, start, size, end = _directory_place(source)
    entries = _entries(source, count, start, size, end)
    ordered = sorted(entries, key=lambda entry: entry.offset)
    at, found = 0, {}
    for i, entry in enumerate(ordered):
        if entry.offset != at:
            raise UnsafeFile("the archive has hidden or overlapping members", path=source.path, offset=at)
        at = ordered[i + 1].offset if i + 1 < len(ordered) else start
        found[entry.raw_name] = _member(source, entry, at)
    if at != start:
        raise UnsafeFile("the archive has hidden bytes before its directory", path=source.path, offset=at)
    return _by_name(source, [found[entry.raw_name] for entry in entries])


def _directory_place(source: Source) -> tuple[int, int, int, int]:
    """Number of entries, start and size of the central directory, and where it must end."""
    at = source.size - _EOCD.size
    if at < 0 or source.read(at, 4) != b"PK\x05\x06":
        raise _no_end(source)
    _, disk, first, here, count, size, start, comment = _EOCD.unpack(source.read(at, _EOCD.size))
    if disk or first or here != count or comment:
        raise UnsafeFile("the archive spans disks or carries a comment", path=source.path, offset=at)
    locator = at - _LOCATOR.size
    if locator >= 0 and source.read(locator, 4) == b"PK\x06\x07":
        return _place64(source, locator, (count, size, start))
    return count, start, size, at


def _no_end(source: Source) -> CorruptFile:
    """The commonest real case is a download that stopped; bytes after the end are the hostile one."""
    tail = source.read(max(0, source.size - _TAIL), min(source.size, _TAIL))
    if b"PK\x05\x06" in tail:
        return CorruptFile("bytes follow the end of the archive", path=source.path, offset=source.size)
    return CorruptFile(
        "the archive is truncated: its directory is missing",
        path=source.path,
        offset=source.size,
        hint="download it again",
    )


def _place64(source: Source, locator: int, short: tuple[int, int, int]) -> tuple[int, int, int, int]:
    _, disk, at, disks = _LOCATOR.unpack(source.read(locator, _LOCATOR.size))
    record = _EOCD64.unpack(source.read(at, _EOCD64.size))
    signature, length, _, _, here_disk, first, here, count, size, start = record
    if signature != b"PK\x06\x06" or length != _EOCD64.size - 12 or at + _EOCD64.size != locator or disks > 1:
        raise UnsafeFile("the zip64 end record is not where it must be", path=source.path, offset=locator)
    limits = (0xFFFF, _FULL32, _FULL32)
    agree = all(low in {big, limit} for low, big, limit in zip(short, (count, size, start), limits, strict=True))
    if disk or here_disk or first or here != count or not agree:
        raise UnsafeFile("the two end records of the archive disagree", path=source.path, offset=at)
    return count, start, size, at


def _entries(source: Source, count: int, start: int, size: int, end: int) -> list[_Entry]:
    if count > MAX_MEMBERS or size > MAX_DIRECTORY:
        raise UnsafeFile(f"an archive of {count} members", path=source.path, offset=start)
    if start + size != end:
        raise UnsafeFile(
            "the directory of the archive does not end where the archive does", path=source.path, offset=start
        )
    data, at, entries = source.read(start, size), 0, []
    while at < size:
        entry, at = _entry(source, data, at, start)
        entries.append(entry)
    if len(entries) != count:
        raise UnsafeFile(f"the archive counts {count} members and lists {len(entries)}", path=source.path, offset=start)
    return entries


def _entry(source: Source, data: bytes, at: int, base: int) -> tuple[_Entry, int]:
    if at + _CENTRAL.size > len(data) or data[at : at + 4] != b"PK\x01\x02":
        raise CorruptFile("the directory of the archive is damaged", path=source.path, offset=base + at)
    row = _CENTRAL.unpack_from(data, at)
    _, _, needed, flags, method, _, _, crc, stored, size, name_size, extra_size, comment, disk, _, _, offset = row
    name_at = at + _CENTRAL.size
    after = name_at + name_size + extra_size
    if (
        disk
        or comment
        or needed > _MAX_VERSION
        or flags & ~_ALLOWED_FLAGS
        or method not in {STORED, DEFLATED}
        or after > len(data)
    ):
        raise UnsafeFile(
            "a member is encrypted, split, commented or of an unknown method", path=source.path, offset=base + at
        )
    name, extra = data[name_at : name_at + name_size], data[name_at + name_size : after]
    if _FULL32 in {stored, size, offset}:
        size, stored, offset = _zip64(source, extra, (size, stored, offset), base + at)
    return _Entry(name, flags, method, crc, stored, size, offset), after


def _zip64(source: Source, extra: bytes, values: tuple[int, ...], at: int) -> tuple[int, ...]:
    """Replace the values that say 0xffffffff by those of the zip64 extra field, which lists only them, in order."""
    field = next((body for kind, body in _extras(extra) if kind == 1), b"")
    if len(field) < 8 * values.count(_FULL32):
        raise CorruptFile("a member has zip64 sizes without saying them", path=source.path, offset=at)
    longs = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
    return tuple(next(longs) if value == _FULL32 else value for value in values)


def _extras(extra: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        found.append((kind, extra[at + 4 : at + 4 + size]))
        at += 4 + size
    return found


def _member(source: Source, entry: _Entry, following: int) -> Member:
    """Check the local header against ``entry``; ``following`` is where the next member or the directory begins."""
    at = entry.offset
    # One read for the fixed part, the name and the usual padding.
    window = source.read(at, max(0, min(_LOCAL.size + len(entry.raw_name) + 64, following - at)))
    if len(window) < _LOCAL.size or window[:4] != b"PK\x03\x04":
        raise CorruptFile("a member's local header is missing", path=source.path, offset=at)
    _, needed, flags, method, _, _, crc, stored, size, name_size, extra_size = _LOCAL.unpack_from(window)
    start = at + _LOCAL.size + name_size + extra_size
    if (
        window[_LOCAL.size : _LOCAL.size + name_size] != entry.raw_name
        or (flags, method) != (entry.flags, entry.method)
        or needed > _MAX_VERSION
    ):
        raise UnsafeFile("a member has another name, flags or method in its own header", path=source.path, offset=at)
    if _FULL32 in {stored, size}:
        extra = source.read(start - extra_size, extra_size)
        size, stored = _zip64(source, extra, (size, stored), at)
    later = bool(flags & _DESCRIPTOR_FLAG)
    if (crc, stored, size) != (entry.crc, entry.stored, entry.size) and not (later and not (stored or size)):
        raise UnsafeFile("a member has another size or checksum in its own header", path=source.path, offset=at)
    _check_end(source, entry, start + entry.stored, following)
    if entry.method == STORED and entry.stored != entry.size:
        raise CorruptFile("a stored member has two sizes", path=source.path, offset=at)
    return Member(_text(source, entry), entry.method, entry.crc, entry.stored, entry.size, start)


def _check_end(source: Source, entry: _Entry, end: int, following: int) -> None:
    """The payload is followed at once by the next member, or by its own data descriptor first."""
    gap = following - end
    if gap == 0 and not entry.flags & _DESCRIPTOR_FLAG:
        return
    layouts = {12: "<3L", 16: "<4x3L", 20: "<L2Q", 24: "<4xL2Q"}
    if gap in layouts and entry.flags & _DESCRIPTOR_FLAG:
        data = source.read(end, gap)
        signed = gap in {12, 20} or data[:4] == b"PK\x07\x08"
        if signed and struct.unpack(layouts[gap], data) == (entry.crc, entry.stored, entry.size):
            return
    raise UnsafeFile("the archive has hidden or overlapping bytes after a member", path=source.path, offset=end)


def _text(source: Source, entry: _Entry) -> str:
    try:
        return entry.raw_name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorruptFile("a member name is not UTF-8", path=source.path, offset=entry.offset) from error


def _by_name(source: Source, found: list[Member]) -> dict[str, Member]:
    """Names as keys. Duplicates (also when case is ignored), absolute names and climbing ones are refused."""
    folded: set[str] = set()
    for member in found:
        name = member.name
        if (
            not name.isprintable()
            or not name
            or set(name) & set("\\:")
            or {"", "..", "."} & set(name.removesuffix("/").split("/"))
        ):
            raise UnsafeFile(f"a member is called {name[:80]!a}", path=source.path, offset=member.start)
        if name.casefold() in folded:
            raise UnsafeFile(f"two members are called {name[:80]!r}", path=source.path, offset=member.start)
        folded.add(name.casefold())
    return {member.name: member for member in found}


def content(source: Source, member: Member, limit: int, *, check: bool = True) -> bytes:
    """The bytes of one member, inflated if need be, at most ``limit``; the CRC is verified unless ``check`` is off."""
    if member.size > limit:
        raise UnsafeFile(
            f"{member.name} has {member.size} bytes, more than the {limit} allowed",
            path=source.path,
            offset=member.start,
        )
    data = source.read(member.start, member.stored)
    if member.method == DEFLATED:
        data = _inflate(source, member, data)
    if check and zlib.crc32(data) != member.crc:
        raise CorruptFile(f"{member.name} fails its checksum", path=source.path, offset=member.start)
    return data


def _inflate(source: Source, member: Member, data: bytes) -> bytes:
    if member.size > MAX_RATIO * max(member.stored, 1):
        raise UnsafeFile(f"{member.name} is compressed beyond belief", path=source.path, offset=member.start)
    engine = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        result = engine.decompress(data, member.size + 1)
    except zlib.error as error:
        raise CorruptFile(f"{member.name} cannot be inflated", path=source.path, offset=member.start) from error
    if len(result) != member.size or not engine.eof or engine.unused_data:
        raise CorruptFile(f"{member.name} inflates to another size than it says", path=source.path, offset=member.start)
    return result
