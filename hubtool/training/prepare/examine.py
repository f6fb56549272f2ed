"""Look at every picture once: can it be read, is it large and sharp enough, what is it like."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hubtool.errors import CorruptFile
from hubtool.training.data import images
from hubtool.training.data.items import Item, caption_of, mask_of, pillow
from hubtool.training.prepare.options import Options

_SIDE = 8  # of the difference hash: 8 x 8 comparisons
_BLANK = 2.0  # standard deviation of the greys (of 255) of a picture that shows nothing


@dataclass(frozen=True, slots=True)
class Look:
    """``pixels``: SHA-256 of the picture as shown; ``shape``: its difference hash (64 bits); ``sharpness``: variance of the Laplacian.

    ``problem``: why the picture cannot be used, None for a good one.
    """

    item: Item
    pixels: str = ""
    shape: int = 0
    sharpness: float = 0.0
    problem: str | None = None


def look(path: Path, options: Options) -> Look:
    """Everything about one picture. Never raises for a bad one: that is what ``problem`` is for."""
    try:
        picture = images.opened(path)
        item = Item(path, picture.size, caption_of(path), mask_of(path))
        _check_mask(item, options)
    except CorruptFile as error:
        beside = "" if error.path is None or Path(error.path) == path else f"{Path(error.path).name}: "
        return Look(Item(path, (0, 0)), problem=f"{beside}{error.message}")
    digest = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
    grey = _grey(picture)
    sharp = sharpness(grey)
    return Look(item, digest, difference_hash(picture), sharp, _problem(item, grey, sharp, options))


def _check_mask(item: Item, options: Options) -> None:
    """Raise ``CorruptFile`` for a mask that cannot be read, where masks are asked for."""
    if options.masks and item.mask is not None:
        images.loaded(item.mask)


def difference_hash(picture: Any) -> int:
    """64 bits: whether each of 8 x 8 places of the shrunk grey picture is brighter than its right neighbour.

    Scaling, compressing and small changes of brightness leave it almost alone (Krawetz 2013, dHash).
    """
    small = picture.convert("L").resize((_SIDE + 1, _SIDE), pillow().Resampling.BOX).tobytes()
    rows = (small[row * (_SIDE + 1) : (row + 1) * (_SIDE + 1)] for row in range(_SIDE))
    bits = (left > right for row in rows for left, right in pairwise(row))
    return sum(bit << at for at, bit in enumerate(bits))


def sharpness(grey: Any) -> float:
    """Variance of the Laplacian of a grey picture (h, w), shrunk to at most 512 pixels a side before: higher is sharper."""
    if min(grey.shape) < 3:
        return 0.0
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((around - 4.0 * grey[1:-1, 1:-1]).var())


def _grey(picture: Any) -> Any:
    import numpy as np

    small = picture.convert("L")
    small.thumbnail((512, 512))
    return np.asarray(small, dtype=np.float32)


def _problem(item: Item, grey: Any, sharp: float, options: Options) -> str | None:
    return next(_problems(item, grey, sharp, options), None)


def _problems(item: Item, grey: Any, sharp: float, options: Options) -> Iterator[str]:
    width, height = item.size
    if min(item.size) < options.least:
        yield f"{width}x{height}: the shorter side is under {options.least} pixels"
    if max(item.size) > 8 * min(item.size):
        yield f"{width}x{height}: too long and narrow for any bucket"
    if float(grey.std()) < _BLANK:
        yield "it shows nothing: all of one colour"
    if sharp < options.blur:
        yield f"it is blurred: sharpness {sharp:.1f} is under {options.blur:g}"
