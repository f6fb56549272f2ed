"""A1111's embedding pictures, written by the reference algorithm (``image_embedding.py``): an oracle for the reader."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

Pixel = tuple[int, int, int]
Rows = list[list[Pixel]]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(rows: Rows, *, text: bytes | None = None, filters: Sequence[int] = (0,), alpha: bool = False) -> bytes:
    """An 8-bit RGB or RGBA PNG; ``filters`` are used in turn, one per row."""
    channels = 4 if alpha else 3
    raw, previous = bytearray(), bytes(len(rows[0]) * channels)
    for number, row in enumerate(rows):
        line = b"".join(bytes((*pixel, 255) if alpha else pixel) for pixel in row)
        kind = filters[number % len(filters)]
        raw += bytes([kind]) + _filtered(kind, line, previous, channels)
        previous = line
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 6 if alpha else 2, 0, 0, 0)
    words = b"" if text is None else chunk(b"tEXt", b"sd-ti-embedding\0" + text)
    data = zlib.compress(bytes(raw))
    half = len(data) // 2
    idat = chunk(b"IDAT", data[:half]) + chunk(b"IDAT", data[half:])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + words + idat + chunk(b"IEND", b"")


def _filtered(kind: int, line: bytes, above: bytes, step: int) -> bytes:
    out = bytearray()
    for i, value in enumerate(line):
        left = line[i - step] if i >= step else 0
        corner = above[i - step] if i >= step else 0
        guess = (0, left, above[i], (left + above[i]) // 2, paeth(left, above[i], corner))[kind]
        out.append((value - guess) & 255)
    return bytes(out)


def paeth(left: int, up: int, corner: int) -> int:
    estimate = left + up - corner
    return min((left, up, corner), key=lambda value: abs(estimate - value))


def text_of(payload: Any) -> bytes:
    return base64.b64encode(json.dumps(payload).encode())


def barred(payload: Any, *, height: int = 32, picture: int = 40, border: int = 0) -> Rows:
    """The picture with the two bars; ``border`` adds black rows and columns around it."""
    data = zlib.compress(json.dumps(payload).encode(), 9)
    low, high = ([value & 15 for value in data], [value >> 4 for value in data])
    size = height * 3 * -(-len(data) // (height * 3))
    bars = [_bar([values[i % len(values)] for i in range(size)], height) for values in (low, high)]
    black, middle = (0, 0, 0), (200, 100, 50)
    rows = [[*left, black, *[middle] * picture, black, *right] for left, right in zip(*bars, strict=True)]
    side = [black] * border
    rows = [[*side, *row, *side] for row in rows]
    edge = [[black] * len(rows[0]) for _ in range(border)]
    return [*edge, *rows, *edge]


def _bar(values: list[int], height: int) -> Rows:
    mixed = [value ^ (key & 15) for value, key in zip(values, lcg(), strict=False)]
    marked = [value | 0xA0 for value in mixed]  # the upper bits are decoration
    width = len(values) // (height * 3)
    at = iter(marked)
    return [[(next(at), next(at), next(at)) for _ in range(width)] for _ in range(height)]


def lcg() -> Iterator[int]:
    seed = 0
    while True:
        seed = (1664525 * seed + 1013904223) % 2**32
        yield seed % 255
