"""Between a module as an outside naming keeps it and the canonical modules it stands for: the two directions of every naming row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from hubtool.adapters.fusing import Fused, fuse
from hubtool.adapters.ir import Patch
from hubtool.adapters.weight_ops import SwapHalves, TakeRows, Transpose
from hubtool.errors import Unsupported
from hubtool.layouts import vocabulary
from hubtool.layouts.naming import Place


def canonical(patch: Patch, place: Place, size: str) -> dict[str, Patch]:
    """canonical path -> patch, for the patch of an outside module. Raises ``Unsupported`` where its algorithm cannot be taken apart there."""
    match place.op:
        case "swap_halves":
            return {place.parts[0]: patch.under(SwapHalves())}
        case "transpose":
            return {place.parts[0]: patch.under(Transpose())}
        case "rows":
            return dict(_cut(patch, place, rows_of(place, size)))
        case _:
            return {place.parts[0]: patch}


def _cut(patch: Patch, place: Place, rows: Sequence[int]) -> Iterator[tuple[str, Patch]]:
    shape = patch.weight_shape
    out = sum(rows) if shape is None else shape[0]
    start = 0
    for part, count in zip(place.parts, rows, strict=True):
        if start == out:
            return  # a fused module may cover the leading parts only
        yield part, patch.under(TakeRows(start, start + count))
        start += count
    if start != out:
        raise Unsupported(f"{place.outside} has {out} rows, and its parts have {list(rows)}")


def outside(parts: Mapping[str, Patch], place: Place, size: str) -> Fused:
    """The patch of the outside module from those of its canonical parts: canonical path -> patch; a part that is not there counts as unchanged.

    Raises ``Unsupported``.
    """
    first = next(iter(parts.values()))
    match place.op:
        case "swap_halves":
            return Fused(first.under(SwapHalves()))
        case "transpose":
            return Fused(first.under(Transpose()))
        case "rows":
            return fuse([parts.get(part) for part in place.parts], rows_of(place, size))
        case _:
            return Fused(first)


def rows_of(place: Place, size: str) -> tuple[int, ...]:
    """The rows of each part in one model. Raises ``Unsupported`` for a part that is no weight there."""
    shapes = [vocabulary.model(size).get(part, {}).get("weight") for part in place.parts]
    if None in shapes:
        raise Unsupported(f"{place.outside} has parts without a weight in {size}")
    return tuple(shape[0] for shape in shapes if shape)
