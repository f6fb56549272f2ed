"""One image as numbers: turned upright, on white where it is transparent, scaled, cut, mirrored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubtool.errors import CorruptFile
from hubtool.training.data import buckets
from hubtool.training.data.items import Item, pillow


@dataclass(frozen=True, slots=True)
class Cut:
    """How an image becomes its bucket: scaled to ``shown``, then cut at ``corner`` (left, top)."""

    bucket: tuple[int, int]
    shown: tuple[int, int]
    corner: tuple[int, int]
    mirrored: bool = False


def cut(item: Item, bucket: tuple[int, int], across: float = 0.5, down: float = 0.5, mirrored: bool = False) -> Cut:
    """The window of ``item`` at the relative place (``across``, ``down``)."""
    shown = buckets.scaled(item.size, bucket)
    return Cut(bucket, shown, buckets.window(shown, bucket, across, down), mirrored)


def pixels(item: Item, how: Cut) -> Any:
    """(3, height, width) between -1 and 1, fp32. Raises ``CorruptFile``."""
    import numpy as np
    import torch

    picture = np.asarray(_fitted(opened(item.path), how), dtype=np.float32)
    return torch.from_numpy(picture / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def weights(item: Item, how: Cut) -> Any:
    """(1, height, width) between 0 and 1: the mask, else the alpha channel, else ones."""
    import numpy as np
    import torch

    mask = _mask(item)
    if mask is None:
        return torch.ones(1, how.bucket[1], how.bucket[0])
    return torch.from_numpy(np.array(_fitted(mask, how), dtype=np.float32) / 255.0)[None]


def opened(path: Path) -> Any:
    """An RGB picture, upright; what is transparent is white. Raises ``CorruptFile``."""
    picture = loaded(path)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        own = picture.convert("RGBA")
        paper = pillow().new("RGBA", own.size, "white")
        paper.alpha_composite(own)
        picture = paper
    return picture.convert("RGB")


def loaded(path: Path) -> Any:
    """The picture as it is in the file, all of it read, upright. Raises ``CorruptFile``."""
    image = pillow()
    from PIL import ImageOps

    try:
        with image.open(path) as source:
            source.load()
            return ImageOps.exif_transpose(_eight_bits(source))
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
        raise CorruptFile(f"this is no readable image: {error}", path=path) from error


def _eight_bits(picture: Any) -> Any:
    """Greys of 16 bits as greys of 8: Pillow's own conversion cuts them off at 255, which leaves a white picture."""
    import numpy as np

    if picture.mode != "I" and not picture.mode.startswith("I;16"):
        return picture
    values = np.asarray(picture).astype(np.float64) / 257.0
    return pillow().fromarray(values.round().clip(0, 255).astype(np.uint8))


def alpha(picture: Any) -> Any | None:
    """The alpha channel as a grey picture, None where there is none or it hides nothing."""
    if picture.mode not in ("RGBA", "LA", "PA") and "transparency" not in picture.info:
        return None
    channel = picture.convert("RGBA").getchannel("A")
    return channel if channel.getextrema()[0] < 255 else None


def fitted(picture: Any, shown: tuple[int, int], corner: tuple[int, int], bucket: tuple[int, int]) -> Any:
    """``picture`` scaled to ``shown`` and cut to ``bucket`` at ``corner``."""
    scaled = picture.resize(shown, pillow().Resampling.LANCZOS) if picture.size != shown else picture
    left, top = corner
    return scaled.crop((left, top, left + bucket[0], top + bucket[1]))


def _fitted(picture: Any, how: Cut) -> Any:
    from PIL import ImageOps

    done = fitted(picture, how.shown, how.corner, how.bucket)
    return ImageOps.mirror(done) if how.mirrored else done


def _mask(item: Item) -> Any | None:
    return loaded(item.mask).convert("L") if item.mask is not None else alpha(loaded(item.path))
