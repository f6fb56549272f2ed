"""The hidden data of an A1111 embedding picture: zlib bytes as nibbles in the low bits of a left and a right bar.

Encoder: ``insert_image_data_embed`` of A1111's ``modules/textual_inversion/image_embedding.py``; this is its inverse (spec/artefacts.md B.6).
Rows are decoded one by one and given up on as soon as fewer than two columns can be black: an ordinary picture costs one row.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_LOW = bytes(value & 0x0F for value in range(256))
_LCG_A, _LCG_C, _LCG_M = 1664525, 1013904223, 1 << 32
_MOST_PIXELS = 1 << 21  # a hundred vectors need half of it; decoding in Python is slow
_LARGEST_PAYLOAD = 8 << 20
_STEP = 1 << 18
_CHANNELS = {2: 3, 6: 4}  # colour types RGB and RGBA


@dataclass(frozen=True, slots=True)
class Header:
    """The fields of IHDR."""

    width: int
    height: int
    depth: int
    colour: int
    interlace: int


def decode(header: Header, blocks: Iterable[bytes]) -> bytes | None:
    """The hidden bytes, or None when the picture hides nothing. ``blocks`` are the contents of the IDAT chunks."""
    channels = _CHANNELS.get(header.colour)
    if channels is None or header.depth != 8 or header.interlace or header.width * header.height > _MOST_PIXELS:
        return None
    try:
        found = _nibbles(_rows(header, channels, blocks), header.width, channels)
        return None if found is None else _join(*found)
    except zlib.error:
        return None


def _rows(header: Header, channels: int, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Unfiltered rows of the picture, decompressed as they are asked for."""
    stride = header.width * channels
    decoder, buffer, previous = zlib.decompressobj(), bytearray(), bytes(stride)
    for block in blocks:
        data = block
        while data and not decoder.eof:
            buffer += decoder.decompress(data, max(_STEP, stride + 1))
            data = decoder.unconsumed_tail
            while len(buffer) > stride:
                previous = _unfilter(buffer[0], buffer[1 : stride + 1], previous, channels)
                del buffer[: stride + 1]
                yield previous


def _nibbles(rows: Iterator[bytes], width: int, channels: int) -> tuple[bytes, bytes] | None:
    """Low nibbles of the left and the right bar, cropped of black borders as A1111 does it."""
    kept: list[bytes] = []
    pending: list[bytes] = []
    used = lit = 0  # per column: any low nibble set / any pixel with all three channels set
    for row in rows:
        red, green, blue = row[0::channels], row[1::channels], row[2::channels]
        bright = bytes(map(min, red, green, blue))
        pending.append(row)
        if not any(bright):
            continue
        if not kept:
            pending = [row]
        kept += pending
        for inner in pending:
            used |= _column_bits(inner, channels)
        pending = []
        lit |= int.from_bytes(bright, "big")
        if used.to_bytes(width, "big").count(0) < 2:
            return None
    return _bars(kept, used.to_bytes(width, "big"), lit.to_bytes(width, "big"), channels)


def _column_bits(row: bytes, channels: int) -> int:
    low = row.translate(_LOW)
    red, green, blue = (int.from_bytes(low[channel::channels], "big") for channel in range(3))
    return red | green | blue


def _bars(rows: list[bytes], used: bytes, lit: bytes, channels: int) -> tuple[bytes, bytes] | None:
    first, last = _span(lit)
    black = [column for column in range(first, last) if not used[column]]
    if len(black) < 2 or black[0] == first or black[-1] + 1 == last:
        return None
    left, right = range(first, black[0]), range(black[-1] + 1, last)
    return _block(rows, left, channels), _block(rows, right, channels)


def _span(lit: bytes) -> tuple[int, int]:
    columns = [column for column, value in enumerate(lit) if value]
    return (columns[0], columns[-1] + 1) if columns else (0, 0)


def _block(rows: list[bytes], columns: range, channels: int) -> bytes:
    """Low nibbles of a bar, row by row, three channels each, with the scrambling undone."""
    out = bytearray()
    for row in rows:
        low = row[columns.start * channels : columns.stop * channels].translate(_LOW)
        if channels == 3:
            out += low
        else:
            pixels = zip(low[0::4], low[1::4], low[2::4], strict=True)
            out += bytes(value for pixel in pixels for value in pixel)
    return bytes(value ^ key for value, key in zip(out, _keys(), strict=False))


def _keys() -> Iterator[int]:
    seed = 0
    while True:
        seed = (_LCG_A * seed + _LCG_C) % _LCG_M
        yield seed % 255 & 0x0F


def _join(low: bytes, high: bytes) -> bytes | None:
    if len(low) != len(high):
        return None
    packed = bytes(upper << 4 | lower for lower, upper in zip(low, high, strict=True))
    decoder = zlib.decompressobj()
    data = decoder.decompress(packed, _LARGEST_PAYLOAD)
    return data if decoder.eof else None


def _unfilter(kind: int, line: bytearray, above: bytes, channels: int) -> bytes:
    """Undo one row's PNG filter (section 9.2)."""
    if kind == 1:
        for i in range(channels, len(line)):
            line[i] = (line[i] + line[i - channels]) & 255
    elif kind == 2:
        return bytes((value + up) & 255 for value, up in zip(line, above, strict=True))
    elif kind == 3:
        for i, up in enumerate(above):
            left = line[i - channels] if i >= channels else 0
            line[i] = (line[i] + ((left + up) >> 1)) & 255
    elif kind == 4:
        _paeth(line, above, channels)
    elif kind:
        raise zlib.error(f"PNG filter {kind}")
    return bytes(line)


def _paeth(line: bytearray, above: bytes, channels: int) -> None:
    for i, up in enumerate(above):
        left, corner = (line[i - channels], above[i - channels]) if i >= channels else (0, 0)
        to_left, to_up, to_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
        nearest = min(to_left, to_up, to_corner)  # ties go to the left, then up
        guess = left if to_left == nearest else up if to_up == nearest else corner
        line[i] = (line[i] + guess) & 255
