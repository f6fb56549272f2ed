"""What a file is, by its first bytes and never by its name; and the right word for what hubtool does not open."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from hubtool.errors import CorruptFile, UnsafeFile, UnsupportedFile
from hubtool.tensors.reading import pread_exact

HEAD = 512
_AGAIN = "download it again"
_ASK = "ask the author for a safetensors file"
# A pickle of protocol 0 or 1 that begins by naming a global.
_TEXT_PICKLE = rb"[()\]}ld]{0,8}c[A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n"
_HTML = rb"(?i:(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html|head|body|title|\?xml|!--))"
_LFS = b"version https://git-lfs.github.com/spec/"

# Content -> module of ``hubtool.formats`` whose ``read`` opens it.
READERS = ((b"PK\x03\x04", "torch_zip"), (b"PK\x05\x06", "torch_zip"), (b"\x89PNG\r\n\x1a\n", "png"))


class _Refusal(NamedTuple):
    """Content that is refused by name: ``magic`` at ``at``, what to call it, what to do about it."""

    magic: bytes
    what: str
    hint: str | None = None
    at: int = 0


_REFUSED = (
    _Refusal(b"7z\xbc\xaf\x27\x1c", "a 7z archive", "extract it, and look at what is inside"),
    _Refusal(b"\x1f\x8b", "gzip-compressed data", "decompress it first"),
    _Refusal(b"Rar!\x1a\x07", "a RAR archive", "extract it, and look at what is inside"),
    _Refusal(b"BZh", "bzip2-compressed data", "decompress it first"),
    _Refusal(b"\xfd7zXZ\x00", "xz-compressed data", "decompress it first"),
    _Refusal(b"\x28\xb5\x2f\xfd", "zstd-compressed data", "decompress it first"),
    _Refusal(b"ustar", "a tar archive", "extract it; torch files this old must be saved again", 257),
    _Refusal(b"\x93NUMPY", "a NumPy .npy array"),
    _Refusal(b"GGUF", "a GGUF file"),
    _Refusal(b"ggml", "a GGML file"),
    _Refusal(b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras?)", _ASK),
    _Refusal(b"SQLite format 3\x00", "an SQLite database"),
    _Refusal(b"\xff\xd8\xff", "a JPEG picture", "a preview? the adapter is another file"),
    _Refusal(b"GIF8", "a GIF picture"),
    _Refusal(b"WEBP", "a WebP picture", "a preview? the adapter is another file", 8),
    _Refusal(b"ftypavif", "an AVIF picture", "a preview? the adapter is another file", 4),
    _Refusal(b"%PDF", "a PDF document"),
    _Refusal(b"\x7fELF", "a program"),
    _Refusal(b"MZ", "a Windows program"),
    _Refusal(b"#!", "a script"),
)


def reader_of(path: Path, fd: int, size: int) -> str:
    """Name of the module of ``hubtool.formats`` that reads the file behind ``fd``.

    Raises ``CorruptFile`` (empty, pointer, zero-filled), ``UnsafeFile`` (a text pickle) or ``UnsupportedFile`` with the right word.
    """
    if size == 0:
        raise CorruptFile("the file is empty", path=path, hint=_AGAIN)
    head = pread_exact(fd, min(size, HEAD), 0, path)
    for magic, module in READERS:
        if head.startswith(magic):
            return module
    # Protocol 2 to 5; a smaller number of protocol is judged (and refused) there as well.
    if head[0] == 0x80 and (size == 1 or head[1] < 8):
        return "safetensors" if _is_safetensors(head, size) else "torch_legacy"
    if _is_safetensors(head, size):
        return "safetensors"
    _refuse(path, fd, size, head)
    raise _unknown(path, head)


def _is_safetensors(head: bytes, size: int) -> bool:
    """Eight bytes of length, then JSON. A length beyond the file, with JSON behind it, is a truncated or lying safetensors."""
    return size >= 10 and head[8:].lstrip(b" \t\r\n")[:1] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40


def _refuse(path: Path, fd: int, size: int, head: bytes) -> None:
    if head.startswith(_LFS):
        raise CorruptFile(f"a git-lfs pointer instead of the file{_pointed(head)}", path=path, hint="git lfs pull")
    if re.match(_HTML, head):
        raise CorruptFile("a web page instead of the file (a login or an error page?)", path=path, hint=_AGAIN)
    for refusal in _REFUSED:
        if head[refusal.at :].startswith(refusal.magic):
            raise UnsupportedFile(refusal.what, path=path, hint=refusal.hint)
    if _is_old_tar(head):
        raise UnsupportedFile("a tar archive", path=path, hint="extract it; torch files this old must be saved again")
    if re.match(_TEXT_PICKLE, head):
        raise UnsafeFile("a pickle in text form that names a program part", path=path, offset=0, hint=_ASK)
    if head.lstrip()[:1] in {b"{", b"["}:
        raise _json(path, head)
    if not any(head) and _is_zero(path, fd, size):
        raise CorruptFile(
            "the file is all zeros: a download that was reserved and never filled", path=path, hint=_AGAIN
        )


def _pointed(head: bytes) -> str:
    found = re.search(rb"\nsize (\d{1,15})\n", head)
    return f" of {int(found[1])} bytes" if found else ""


def _is_old_tar(head: bytes) -> bool:
    """A tar header without the ``ustar`` mark, as torch 0.1 wrote: its checksum field is right."""
    field = head[148:156].strip(b" \0")
    if len(head) < 512 or not re.fullmatch(rb"[0-7]{1,7}", field):
        return False
    return int(field, 8) == sum(head[:148]) + 8 * 32 + sum(head[156:512])


def _json(path: Path, head: bytes) -> CorruptFile | UnsupportedFile:
    if re.match(rb'\s*\{\s*"(?:error|message|detail|status|statusCode|code)"', head):
        return CorruptFile("a server's error message instead of the file", path=path, hint=_AGAIN)
    return UnsupportedFile("a JSON document, not weights", path=path, hint="name the weights, or the folder it lies in")


def _is_zero(path: Path, fd: int, size: int) -> bool:
    """Looks at the beginning, the middle and the end."""
    places = {0, max(0, size // 2 - 2048), max(0, size - 4096)}
    return not any(any(pread_exact(fd, min(4096, size - at), at, path)) for at in places)


def _unknown(path: Path, head: bytes) -> UnsupportedFile:
    text = head[:256].decode("utf-8", "ignore")
    # A character cut by the window costs up to three bytes; anything more is not UTF-8.
    if len(text.encode()) + 3 >= len(head[:256]) and all(char >= " " or char in "\t\r\n" for char in text):
        return UnsupportedFile("text, not weights", path=path)
    return UnsupportedFile(
        "its content is of no known kind", path=path, hint="safetensors, torch and PNG files can be opened"
    )
