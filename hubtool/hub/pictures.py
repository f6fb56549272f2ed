"""Pictures of a gallery: the prompt they carry, and the same picture without anything but its pixels.

A picture tells more than it shows: ComfyUI writes the whole workflow into it, with paths, a camera the place. Only chunks that say how
pixels are decoded are kept (PNG, JPEG, WebP); no pixel is decoded here.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from hubtool.errors import CorruptFile, UnsupportedFile

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PICTURE = 64 << 20
_MAX_TEXT = 1 << 20
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = frozenset(
    {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"bKGD", b"pHYs", b"acTL", b"fcTL", b"fdAT", b"cICP"}
)  # fmt: skip
_WEBP_KEPT = frozenset({b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"ICCP"})
_SETTINGS = re.compile(r"\n(?:Steps: |Negative prompt:)")


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture ready to publish. ``removed``: whether it held anything but pixels."""

    data: bytes
    suffix: str
    prompt: str = ""
    negative: str = ""
    removed: bool = False


def read(data: bytes, path: str) -> Shown:
    """Take a picture apart. Raises ``CorruptFile``, ``UnsupportedFile`` for another format."""
    if len(data) > MAX_PICTURE:
        raise UnsupportedFile(f"a preview of {len(data)} bytes", path=path)
    try:
        if data.startswith(_PNG):
            return _png(data)
        if data.startswith(b"\xff\xd8"):
            kept = b"".join(_jpeg(data))
            return Shown(kept, ".jpg", removed=kept != data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
    except (struct.error, IndexError, ValueError) as error:
        raise CorruptFile("a damaged picture", path=path) from error
    raise UnsupportedFile("not a PNG, JPEG or WebP picture", path=path)


def _png(data: bytes) -> Shown:
    kept, text, at = [_PNG], "", len(_PNG)
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        end = at + 12 + length
        if end > len(data):
            raise ValueError("a chunk ends behind the file")
        if kind in _PNG_KEPT:
            kept.append(data[at:end])
        elif kind in (b"tEXt", b"iTXt"):
            text = text or _parameters(kind, data[at + 8 : end - 4])
        at = end
        if kind == b"IEND":
            break
    made = b"".join(kept)
    return Shown(made, ".png", *split_parameters(text), removed=made != data)


def _parameters(kind: bytes, chunk: bytes) -> str:
    """A1111's generation parameters: the value of the text chunk of that name."""
    key, _, value = chunk.partition(b"\0")
    if key != b"parameters" or len(value) > _MAX_TEXT:
        return ""
    if kind == b"tEXt":
        return value.decode("latin-1")
    compressed, rest = value[:1] == b"\1", value[2:]
    _, _, rest = rest.partition(b"\0")
    _, _, body = rest.partition(b"\0")
    try:
        return (zlib.decompressobj().decompress(body, _MAX_TEXT) if compressed else body).decode("utf-8", "replace")
    except zlib.error:
        return ""


def split_parameters(text: str) -> tuple[str, str]:
    """(prompt, negative prompt) of A1111's parameters."""
    prompt = _SETTINGS.split(text, maxsplit=1)[0].strip()
    _, found, rest = text.partition("\nNegative prompt:")
    return prompt, rest.partition("\nSteps: ")[0].strip() if found else ""


def _jpeg(data: bytes) -> Iterator[bytes]:
    """Every segment but comments and application data other than JFIF, ICC profiles and Adobe's colour transform."""
    yield data[:2]
    at = 2
    while True:
        marker, length = struct.unpack(">HH", data[at : at + 4])
        end = at + 2 + length
        if marker >> 8 != 0xFF or end > len(data):
            raise ValueError("no marker")
        if marker == 0xFFDA:  # the picture itself, up to its end
            stop = data.rfind(b"\xff\xd9")
            yield data[at : stop + 2 if stop > at else len(data)]
            return
        body = data[at + 4 : end]
        application = 0xFFE0 <= marker <= 0xFFEF
        useful = body.startswith((b"JFIF\0", b"ICC_PROFILE\0", b"Adobe"))
        if marker != 0xFFFE and (not application or useful):
            yield data[at:end]
        at = end


def _webp(data: bytes) -> Shown:
    kept, at = [], 12
    while at + 8 <= len(data):
        kind, length = struct.unpack("<4sI", data[at : at + 8])
        end = at + 8 + length + length % 2
        if kind in _WEBP_KEPT:
            chunk = data[at:end]
            # the flags of VP8X promise EXIF and XMP, which are gone
            kept.append(chunk[:8] + bytes([chunk[8] & ~0x0C]) + chunk[9:] if kind == b"VP8X" else chunk)
        at = end
    body = b"WEBP" + b"".join(kept)
    made = b"RIFF" + struct.pack("<I", len(body)) + body
    return Shown(made, ".webp", removed=made != data)
