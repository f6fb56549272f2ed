"""Aspect buckets: sizes of nearly the same area, so that pictures of any shape train without cutting much off."""

from __future__ import annotations

import math
from functools import cache

_MOST = 2.5  # longest side to shortest


@cache
def sizes(resolution: int, step: int) -> tuple[tuple[int, int], ...]:
    """Every (width, height) in multiples of ``step`` with an area of at most ``resolution`` squared, the largest for each width."""
    area, side = resolution * resolution, max(step, resolution // step * step)
    found = {(side, side)}
    for width in range(step, math.floor(resolution * math.sqrt(_MOST)) + 1, step):
        height = area // width // step * step
        if height >= step and max(width, height) <= _MOST * min(width, height):
            found |= {(width, height), (height, width)}
    return tuple(sorted(found))


def nearest(size: tuple[int, int], resolution: int, step: int, *, square: bool = False) -> tuple[int, int]:
    """The bucket whose shape is nearest to that of ``size``, by the ratio of ratios; of equals the larger."""
    if square:
        side = max(step, resolution // step * step)
        return side, side
    shape = math.log(size[0] / size[1])
    return min(sizes(resolution, step), key=lambda one: (abs(math.log(one[0] / one[1]) - shape), -one[0] * one[1]))


def scaled(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[int, int]:
    """``size`` shrunk or grown, in its own shape, until it just covers ``bucket``."""
    factor = max(bucket[0] / size[0], bucket[1] / size[1])
    return max(bucket[0], round(size[0] * factor)), max(bucket[1], round(size[1] * factor))


def window(size: tuple[int, int], bucket: tuple[int, int], across: float, down: float) -> tuple[int, int]:
    """(left, top) of the part of ``size`` that is kept; 0.5 is the centre, 0 the left or upper edge."""
    return int((size[0] - bucket[0]) * across), int((size[1] - bucket[1]) * down)
