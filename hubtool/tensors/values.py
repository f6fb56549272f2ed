"""Looks for NaN, infinity and values close to overflow in the bytes of a tensor, without torch, at hundreds of MB/s.

A float is not finite when its exponent is all ones, and the byte with the sign and most of the exponent gives nearly every float
away: those bytes are sliced out and searched as text. Only where one of them is suspicious is the number itself looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hubtool.tensors.evaluate import chunks
from hubtool.tensors.expr import Read
from hubtool.tensors.ref import TensorRef


@dataclass(frozen=True, slots=True)
class ValueReport:
    """``nonfinite_at``: row-major index of the first NaN or infinity. ``near_overflow``: something is one doubling from fp16's infinity."""

    nonfinite_at: int | None = None
    near_overflow: bool = False


@dataclass(frozen=True, slots=True)
class _Layout:
    """A dtype's bytes: size of an element; the top bytes that may mean not finite or near overflow; the bits below that decide."""

    size: int
    bad: frozenset[int]
    near: frozenset[int]
    below: int = 0


def _tops(test: Callable[[int], bool]) -> frozenset[int]:
    return frozenset(byte for byte in range(256) if test(byte))


_WIDE_BAD = _tops(lambda top: top & 0x7F == 0x7F)
_HALF_BAD = _tops(lambda top: top & 0x7C == 0x7C)
_HALF_NEAR = _tops(lambda top: top & 0x7C == 0x78)
_NONE: frozenset[int] = frozenset()
# near overflow: 32,768 and more (for F64 131,072, the next border its top byte shows); fp8 tensors are scaled to use their range
_LAYOUTS = {
    "F16": _Layout(2, _HALF_BAD, _HALF_NEAR),
    "BF16": _Layout(2, _WIDE_BAD, _tops(lambda top: top & 0x7F >= 0x47), below=0x80),
    "F32": _Layout(4, _WIDE_BAD, _tops(lambda top: top & 0x7F >= 0x47), below=0x80),
    "F64": _Layout(8, _WIDE_BAD, _tops(lambda top: top & 0x7F >= 0x41), below=0xF0),
    "F8_E5M2": _Layout(1, _HALF_BAD, _NONE),
    "F8_E4M3": _Layout(1, _WIDE_BAD, _NONE),
    "F8_E4M3FNUZ": _Layout(1, frozenset({0x80}), _NONE),
    "F8_E5M2FNUZ": _Layout(1, frozenset({0x80}), _NONE),
    "F8_E8M0": _Layout(1, frozenset({0xFF}), _NONE),
}


def scan_values(ref: TensorRef) -> ValueReport:
    """Report on a float tensor; tensors of other dtypes are fine by definition. Stops at the first value that is not finite.

    Raises ``CorruptFile`` where the file ends early.
    """
    layout = _LAYOUTS.get(ref.dtype)
    if layout is None:
        return ValueReport()
    harmless = bytes(set(range(256)) - layout.bad - layout.near)
    near, done = False, 0
    for chunk in chunks(Read(ref)):
        data = bytes(chunk)
        tops = data[layout.size - 1 :: layout.size]
        odd = set(tops.translate(None, harmless))
        if odd & layout.bad:
            for index in _suspects(tops, layout.bad):
                if _decides(data, index, layout):
                    return ValueReport(done + index, near or bool(odd & layout.near - layout.bad))
        near = near or bool(odd & layout.near)
        done += len(tops)
    return ValueReport(None, near)


def _suspects(tops: bytes, bad: frozenset[int]) -> Iterator[int]:
    marks = tops.translate(bytes(byte in bad for byte in range(256)))
    at = marks.find(1)
    while at >= 0:
        yield at
        at = marks.find(1, at + 1)


def _decides(data: bytes, index: int, layout: _Layout) -> bool:
    return not layout.below or data[(index + 1) * layout.size - 2] & layout.below == layout.below
