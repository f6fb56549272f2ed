"""PNG pictures that are embeddings (A1111): a ``sd-ti-embedding`` text chunk, and the same data in two bars beside the picture.

Own chunk parser and decoder on the standard library's zlib; every size is checked before memory is taken. Other pictures are
healthy files without tensors. Facts: spec/artefacts.md B.6; PNG specification (W3C, third edition), sections 5, 7 and 9.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubtool.errors import CorruptFile, UnsafeFile
from hubtool.formats import png_bars
from hubtool.formats.base import TensorFile
from hubtool.formats.png_payload import payload_file
from hubtool.types import Finding

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEYWORD = b"sd-ti-embedding"
_MOST_PIXELS = 1 << 28  # 268 million: beyond that a picture is a bomb
_LARGEST_TEXT = 8 << 20  # seventy-five vectors take 2 MiB
_MOST_CHUNKS = 100_000
_CHUNK = struct.Struct(">I4s")
_HEADER = struct.Struct(">IIBBBBB")


@dataclass(frozen=True, slots=True)
class _Picture:
    header: png_bars.Header
    text: bytes | None
    data: tuple[tuple[int, int], ...]  # (offset, length) of the IDAT chunks


def read(path: Path, fd: int, size: int) -> TensorFile:
    """Open a PNG. Raises ``CorruptFile`` for a damaged one, ``UnsafeFile`` for one that would take gigabytes to decode."""
    picture = _parse(path, fd, size)
    written = _text_payload(path, picture.text)
    drawn = _drawn_payload(fd, picture)
    payload = drawn if written is None else written
    if payload is None:
        note = Finding("just-a-picture", "info", "a picture without an embedding in it")
        return TensorFile(path, "png", size, {}, findings=(note,), files=(path,))
    findings = []
    if written is None:
        findings.append(
            Finding("png-bars-only", "info", "the text chunk is gone; the embedding was read from the picture's bars")
        )
    elif drawn is not None and drawn != written:
        message = "the text chunk and the picture's bars hold different embeddings; the text chunk was taken"
        findings.append(Finding("png-payload-mismatch", "warning", message))
    return payload_file(path, size, payload, tuple(findings))


def _parse(path: Path, fd: int, size: int) -> _Picture:
    if os.pread(fd, 8, 0) != SIGNATURE:
        raise CorruptFile("no PNG signature", path=path, offset=0)
    header: png_bars.Header | None = None
    text: bytes | None = None
    data: list[tuple[int, int]] = []
    for kind, start, length in _chunks(path, fd, size):
        if header is None:
            header = _header(path, kind, os.pread(fd, length, start))
        elif kind == b"IDAT":
            data.append((start, length))
        elif kind == b"tEXt" and os.pread(fd, len(KEYWORD) + 1, start) == KEYWORD + b"\0":
            text = _text(path, fd, start, length)
    if header is None or not data:
        raise CorruptFile("a PNG without a picture", path=path, offset=size)
    return _Picture(header, text, tuple(data))


def _chunks(path: Path, fd: int, size: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, offset of the content, length) up to IEND, each within the file."""
    at = len(SIGNATURE)
    for _ in range(_MOST_CHUNKS):
        head = os.pread(fd, _CHUNK.size, at)
        if len(head) < _CHUNK.size:
            raise CorruptFile("the PNG ends before its last chunk", path=path, offset=at)
        length, kind = _CHUNK.unpack(head)
        end = at + _CHUNK.size + length + 4
        if length > 0x7FFFFFFF or end > size:
            raise CorruptFile(f"a PNG chunk of {length} bytes leaves the file", path=path, offset=at)
        yield kind, at + _CHUNK.size, length
        if kind == b"IEND":
            return
        at = end
    raise UnsafeFile(f"more than {_MOST_CHUNKS} PNG chunks", path=path, offset=at)


def _header(path: Path, kind: bytes, content: bytes) -> png_bars.Header:
    if kind != b"IHDR" or len(content) != _HEADER.size:
        raise CorruptFile("the first PNG chunk is no header", path=path, offset=len(SIGNATURE))
    width, height, depth, colour, compression, filtering, interlace = _HEADER.unpack(content)
    if not (width and height) or compression or filtering or interlace > 1 or depth not in (1, 2, 4, 8, 16):
        raise CorruptFile("an impossible PNG header", path=path, offset=len(SIGNATURE))
    if width * height > _MOST_PIXELS:
        raise UnsafeFile(f"a picture of {width} x {height} pixels", path=path, offset=len(SIGNATURE))
    return png_bars.Header(width, height, depth, colour, interlace)


def _text(path: Path, fd: int, start: int, length: int) -> bytes:
    if length > _LARGEST_TEXT:
        raise UnsafeFile(f"an embedding text of {length} bytes", path=path, offset=start)
    content = os.pread(fd, length + 4, start)
    if zlib.crc32(b"tEXt" + content[:length]) != int.from_bytes(content[length:], "big"):
        raise CorruptFile("the embedding's text chunk is damaged (CRC)", path=path, offset=start)
    return content[len(KEYWORD) + 1 : length]


def _text_payload(path: Path, text: bytes | None) -> Any:
    if text is None:
        return None
    try:
        return json.loads(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError, RecursionError) as error:
        raise CorruptFile("the embedding's text chunk is not base64 of JSON", path=path) from error


def _drawn_payload(fd: int, picture: _Picture) -> Any:
    """What the bars say; None where there are none. Damage there is not damage of the file: other tools re-encode pictures."""
    blocks = (os.pread(fd, length, start) for start, length in picture.data)
    data = png_bars.decode(picture.header, blocks)
    if data is None:
        return None
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and "string_to_param" in found else None
