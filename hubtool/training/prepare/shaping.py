"""Cut a picture and its mask to a bucket."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hubtool.training import seeds
from hubtool.training.data import buckets, images
from hubtool.training.data.batches import bucket_step
from hubtool.training.data.items import Item
from hubtool.training.prepare.options import Options


@dataclass(frozen=True, slots=True)
class Shape:
    """``size``: what comes out; ``scaled``: the picture before cutting; ``corner``: left and upper edge of the window."""

    size: tuple[int, int]
    scaled: tuple[int, int]
    corner: tuple[int, int]

    def cut(self, picture: Any) -> Any:
        return images.fitted(picture, self.scaled, self.corner, self.size)


def shapes(item: Item, mask: Any | None, options: Options) -> Iterator[Shape]:
    """The windows asked for: one, or ``options.crops`` random ones."""
    if options.crop == "none":
        yield Shape(item.size, item.size, (0, 0))
        return
    step = bucket_step(options.resolution)
    bucket = buckets.nearest(item.size, options.resolution, step, square=not options.buckets)
    scaled = buckets.scaled(item.size, bucket)
    for turn in range(options.crops if options.crop == "random" else 1):
        across, down = _place(item, mask, scaled, bucket, options, turn)
        yield Shape(bucket, scaled, buckets.window(scaled, bucket, across, down))


def _place(
    item: Item, mask: Any | None, scaled: tuple[int, int], bucket: tuple[int, int], options: Options, turn: int
) -> tuple[float, float]:
    """Relative place of the window: its centre goes to the mask's centre of mass, as far as the picture's edge lets it."""
    if options.crop == "random":
        dice = seeds.dice(options.seed, "crop", item.path.name, turn)
        return dice.random(), dice.random()
    if options.crop == "mask" and mask is not None:
        centre = _centre(mask)
        spare = [whole - part for whole, part in zip(scaled, bucket, strict=True)]
        wanted = [share * whole - part / 2 for share, whole, part in zip(centre, scaled, bucket, strict=True)]
        across, down = (min(1.0, max(0.0, at / room)) if room else 0.5 for at, room in zip(wanted, spare, strict=True))
        return across, down
    return 0.5, 0.5


def _centre(mask: Any) -> tuple[float, float]:
    """(x, y) of the centre of mass, as shares of the size; the middle of an empty mask."""
    import numpy as np

    weights = np.asarray(mask, dtype=np.float64)
    total = weights.sum()
    if not total:
        return 0.5, 0.5
    height, width = weights.shape
    across = float((weights.sum(0) * (np.arange(width) + 0.5)).sum() / total / width)
    down = float((weights.sum(1) * (np.arange(height) + 0.5)).sum() / total / height)
    return across, down
