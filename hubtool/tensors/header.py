"""The header of a safetensors file: parsed as strictly as the format allows, and written back.

Rules: the README of safetensors, section "Format", tightened where parsers disagree (duplicate keys, NaN, depth, huge ranks).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from hubtool.errors import CorruptFile, FileError, UnsafeFile
from hubtool.tensors.columns import MAX_RANK, parse_columns
from hubtool.tensors.dtypes import BITS, numel
from hubtool.tensors.reading import pread_exact
from hubtool.tensors.ref import TensorRef
from hubtool.tensors.strict_json import TooDeepError, loads
from hubtool.types import Shape

MAX_HEADER = 100_000_000
METADATA = "__metadata__"
_FIRST_READ = 64 << 10
_MAX_DEPTH = 4
_LIMIT = 1 << 63
_FIELDS = {"dtype", "shape", "data_offsets"}
_JSON = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


class Header(NamedTuple):
    """A checked header. ``raw`` is its JSON as it lies in the file; tensor ranges are absolute; ``tensors`` is in header order."""

    raw: bytes
    tensors: dict[str, TensorRef]
    metadata: dict[str, str]
    unknown_fields: tuple[str, ...] = ()
    plain: bool = False  # compact, with nothing worth a finding in names and shapes

    @property
    def data_start(self) -> int:
        """Offset of the first byte after the header."""
        return 8 + len(self.raw)


class _HeaderError(ValueError):
    """Why a header is refused; becomes a ``CorruptFile`` with the path."""


def read(fd: int, size: int, path: Path) -> Header:
    """Read and check the header of an open file of ``size`` bytes. Raises ``CorruptFile`` or ``UnsafeFile``."""
    raw = _raw(fd, size, path)
    return parse(raw, size - 8 - len(raw), path)


def _raw(fd: int, size: int, path: Path) -> bytes:
    first = os.pread(fd, _FIRST_READ, 0)
    if size < 10 or len(first) < 10:
        raise CorruptFile(f"{size} bytes are too few for a safetensors file", path=path, offset=0)
    length = int.from_bytes(first[:8], "little")
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise CorruptFile(f"the header claims {length} bytes in a file of {size}", path=path, offset=0)
    raw = first[8 : 8 + length]
    return raw if len(raw) == length else raw + pread_exact(fd, length - len(raw), 8 + len(raw), path)


def parse(raw: bytes, body: int, path: Path) -> Header:
    """Check a header that stands before ``body`` bytes of data. Raises ``CorruptFile``, or ``UnsafeFile`` for abuse of the parser."""
    columns = parse_columns(raw, body, path)
    if columns is not None:
        return Header(raw, *columns, plain=True)
    if not raw.lstrip(b" \t\r\n").startswith(b"{"):
        raise CorruptFile("the header is not a JSON object", path=path, offset=8)
    try:
        return _checked(raw, loads(raw, max_depth=_MAX_DEPTH), body, path)
    except TooDeepError as error:
        raise UnsafeFile(f"bad header: {error}", path=path, offset=8) from None
    except ValueError as error:
        raise CorruptFile(f"bad header: {error}", path=path, offset=8) from None


def serialise(
    entries: Iterable[tuple[str, str, Shape, int]],
    metadata: Mapping[str, str] | None = None,
    *,
    phase: int | None = None,
) -> bytes:
    """A compact header for (name, dtype, shape, bytes) laid one after another, metadata first, padded with spaces.

    The data section starts at a multiple of 8; with ``phase`` (a multiple of 8) at that offset within a page of 4096 bytes.
    """
    parts = [] if metadata is None else [f"{_JSON(METADATA)}:{_JSON(dict(metadata))}"]
    at = 0
    for name, dtype, shape, count in entries:
        parts.append(f"{_JSON(name)}:{_opening(dtype, shape)}{at},{at + count}]}}")
        at += count
    try:
        raw = f"{{{','.join(parts)}}}".encode()
    except UnicodeEncodeError:
        raise FileError("a name or a metadata value is not valid text (lone surrogate)") from None
    step, rest = (8, 0) if phase is None else (4096, phase)
    return raw + b" " * ((rest - 8 - len(raw)) % step)


@lru_cache(4096)  # a model has few distinct types; a dictionary for each tensor takes longer than the rest of a header
def _opening(dtype: str, shape: Shape) -> str:
    """An entry up to its first offset."""
    return f'{_JSON({"dtype": dtype, "shape": list(shape)})[:-1]},"data_offsets":['


def _checked(raw: bytes, document: dict[str, Any], body: int, path: Path) -> Header:
    metadata = _metadata(document.pop(METADATA, {}))
    base = 8 + len(raw)
    tensors: dict[str, TensorRef] = {}
    unknown: set[str] = set()
    for name, entry in document.items():
        dtype, shape, begin, end = _entry(name, entry)
        tensors[name] = TensorRef(name, dtype, shape, path, base + begin, base + end)
        if len(entry) > len(_FIELDS):
            unknown.update(entry.keys() - _FIELDS)
    _check_tiling([(ref.start - base, ref.end - base) for ref in tensors.values()], body)
    return Header(raw, tensors, metadata, tuple(sorted(unknown)))


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _HeaderError("__metadata__ is not an object of strings")
    return value


def _entry(name: str, entry: Any) -> tuple[str, Shape, int, int]:
    if not isinstance(entry, dict) or not entry.keys() >= _FIELDS:
        raise _HeaderError(f"the entry of {_short(name)} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _HeaderError(f"{_short(name)} has an unknown dtype")
    if not _naturals(shape) or len(shape) > MAX_RANK:
        raise _HeaderError(f"{_short(name)} has an impossible shape")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _HeaderError(f"{_short(name)} has impossible offsets")
    begin, end = offsets
    bits = numel(shape) * BITS[dtype]
    if (end - begin) * 8 != bits:
        raise _HeaderError(f"{_short(name)} needs {bits} bits and spans {end - begin} bytes")
    return dtype, tuple(shape), begin, end


def _short(name: str) -> str:
    return ascii(name if len(name) < 80 else name[:77] + "...")


def _naturals(value: Any) -> bool:
    # type() and not isinstance(): True is an int to Python and no number to JSON
    return type(value) is list and all(type(item) is int and 0 <= item < _LIMIT for item in value)


def _check_tiling(spans: list[tuple[int, int]], body: int) -> None:
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise _HeaderError(
                f"tensors {'overlap' if begin < at else 'leave a gap'} at byte {min(begin, at)} of the data"
            )
        at = end
    if at != body:
        raise _HeaderError(
            f"tensors end at byte {at} of the data, which has {body}: truncated, or followed by something else"
        )
