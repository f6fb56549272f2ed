"""Numbers from bytes with the standard library alone: for alphas and other tiny tensors."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable
from functools import cache

from hubtool.tensors.dtypes import BITS

_STRUCT = {
    "F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b",
    "U64": "Q", "U32": "I", "U16": "H", "U8": "B", "BOOL": "?",
}  # fmt: skip


def decode(data: bytes | bytearray | memoryview, dtype: str) -> tuple[float, ...]:
    """The values of little-endian ``data`` as Python floats. Integers beyond 2**53 round. Raises ``ValueError`` for complex and sub-byte dtypes."""
    if dtype in _STRUCT:
        return tuple(map(float, struct.unpack(f"<{len(data) * 8 // BITS[dtype]}{_STRUCT[dtype]}", data)))
    if dtype == "BF16":
        return _bfloat16(data)
    if dtype in _FLOAT8:
        table = _table(dtype)
        return tuple(table[byte] for byte in bytes(data))
    raise ValueError(f"no scalar values for dtype {dtype}")


def _bfloat16(data: Iterable[int]) -> tuple[float, ...]:
    # bfloat16 is the upper half of a float32
    raw = bytes(data)
    wide = bytearray(len(raw) * 2)
    wide[2::4], wide[3::4] = raw[0::2], raw[1::2]
    return struct.unpack(f"<{len(raw) // 2}f", wide)


def _float8(byte: int, mantissa_bits: int, bias: int) -> float:
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte & 0x7F) >> mantissa_bits, byte & ((1 << mantissa_bits) - 1)
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp((1 << mantissa_bits) | mantissa, exponent - bias - mantissa_bits)


def _e4m3(byte: int) -> float:
    return math.nan if byte & 0x7F == 0x7F else _float8(byte, 3, 7)


def _e5m2(byte: int) -> float:
    value: float = struct.unpack("<e", bytes((0, byte)))[0]  # the upper half of a float16
    return value


def _e4m3fnuz(byte: int) -> float:
    return math.nan if byte == 0x80 else _float8(byte, 3, 8)


def _e5m2fnuz(byte: int) -> float:
    return math.nan if byte == 0x80 else _float8(byte, 2, 16)


def _e8m0(byte: int) -> float:
    return math.nan if byte == 0xFF else math.ldexp(1.0, byte - 127)


_FLOAT8: dict[str, Callable[[int], float]] = {
    "F8_E4M3": _e4m3, "F8_E5M2": _e5m2, "F8_E4M3FNUZ": _e4m3fnuz, "F8_E5M2FNUZ": _e5m2fnuz, "F8_E8M0": _e8m0,
}  # fmt: skip


@cache
def _table(dtype: str) -> tuple[float, ...]:
    return tuple(map(_FLOAT8[dtype], range(256)))
