"""What ``prepare`` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DUPLICATES = ("none", "exact", "perceptual")
CROPS = ("centre", "random", "mask", "none")
CAPTIONS = ("keep", "template", "names", "model")


@dataclass(frozen=True, slots=True)
class Options:
    """``resolution``: side of a square of the same area as every bucket; ``crop``: ``none`` keeps sizes as they are.

    ``distance``: bits (of 64) in which two perceptual duplicates may differ. ``least``: shortest side that is kept. ``blur``: sharpness
    below which a picture is dropped, 0 keeps all. ``crops``: random windows of each picture. ``caption_model`` and ``mask_model``:
    local folders of a captioning model and of CLIPSeg; ``mask_text``: what the mask shall cover.
    """

    resolution: int = 512
    crop: str = "centre"
    crops: int = 1
    buckets: bool = True
    duplicates: str = "perceptual"
    distance: int = 4
    least: int = 64
    blur: float = 0.0
    captions: str = "keep"
    template: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    prefix: str = ""
    caption_model: Path | None = None
    masks: bool = False
    mask_model: Path | None = None
    mask_text: str = ""
    format: str = "png"
    seed: int = 0
