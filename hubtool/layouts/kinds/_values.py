"""Reads the few floats that some decisions need (at most 16 KiB), without torch or numpy."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

from hubtool.tensors.ref import TensorRef

_LIMIT = 1 << 14
_CODES = {"F16": "e", "F32": "f", "F64": "d"}


def floats(ref: TensorRef) -> tuple[float, ...] | None:
    """Values of a small contiguous float tensor; None when it is large, strided, of another dtype, or cannot be read."""
    if ref.nbytes > _LIMIT or not ref.contiguous or ref.dtype not in {*_CODES, "BF16"}:
        return None
    data = ref.inline if ref.inline is not None else _pread(ref)
    if len(data) != ref.nbytes:
        return None
    if ref.dtype == "BF16":
        halves = struct.unpack(f"<{len(data) // 2}H", data)
        data = struct.pack(f"<{len(halves)}I", *(half << 16 for half in halves))
    code = _CODES.get(ref.dtype, "f")
    return struct.unpack(f"<{len(data) // struct.calcsize(code)}{code}", data)


def _pread(ref: TensorRef) -> bytes:
    try:
        fd = os.open(ref.path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.pread(fd, ref.nbytes, ref.start)
    finally:
        os.close(fd)


def kurtosis(values: Sequence[float]) -> float:
    """Fourth standardised moment (3 for a normal distribution); 0 where there is no spread."""
    mean = sum(values) / len(values)
    squares = [(value - mean) ** 2 for value in values]
    variance = sum(squares) / len(values)
    return sum(square * square for square in squares) / len(values) / variance**2 if variance else 0.0


def deviation(values: Sequence[float]) -> float:
    """Population standard deviation."""
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
