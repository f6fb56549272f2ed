"""Images to latents, each encoded once where nothing about it is random; and the further channels of inpainting bases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hubtool.training import seeds
from hubtool.training.bases.base import Base, drawn, encoded
from hubtool.training.config import Config
from hubtool.training.data import images
from hubtool.training.data.batches import Sample
from hubtool.training.device import Place


@dataclass(frozen=True, slots=True)
class Pictures:
    """Of one batch: ``latents`` (n, c, h, w); ``mask`` (n, 1, H, W) weights of pixels or None; ``more``: inpainting channels or None."""

    latents: Any
    mask: Any
    more: Any


class Latents:
    def __init__(self, base: Base, config: Config, place: Place) -> None:
        self.base, self.config, self.place = base, config, place
        self.keeps = config.data.cache_latents and config.data.crop != "random"
        self.kept: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def pictures(self, samples: Sequence[Sample], device: Any) -> Pictures:
        """Latents of ``samples``, their masks, and what an inpainting base sees beside them."""
        import torch

        latents = torch.cat([self._one(sample) for sample in samples]).to(device)
        mask = None
        if self.config.data.masks:
            mask = torch.stack([images.weights(sample.item, sample.cut) for sample in samples]).to(device)
        more = torch.cat([self._hidden(sample) for sample in samples]).to(device) if self.base.inpainting else None
        return Pictures(latents, mask, more)

    def _one(self, sample: Sample) -> Any:
        import torch

        key = (sample.item.path, sample.cut)
        found = self.kept.get(key) or self._encoded(images.pixels(sample.item, sample.cut)[None])
        if self.keeps:
            self.kept[key] = found
        noise = torch.randn(found[0].shape, generator=seeds.generator(self.config.run.seed, "vae", sample.index))
        return drawn(self.base.pipe.vae, *found, noise)

    def _encoded(self, pixels: Any) -> tuple[Any, Any]:
        with self.place.lent(self.base.pipe.vae):
            return encoded(self.base.pipe.vae, pixels)

    def _hidden(self, sample: Sample) -> Any:
        """(1, 1 + c, h, w): a random mask (1: to be painted), and the latents of what it leaves."""
        import torch
        import torch.nn.functional as F

        pixels = images.pixels(sample.item, sample.cut)[None]
        mask = hole(pixels.shape[-2], pixels.shape[-1], self.config.run.seed, sample.index)
        mean, _ = self._encoded(pixels * (1.0 - mask))
        left = drawn(self.base.pipe.vae, mean, torch.zeros_like(mean), torch.zeros_like(mean))
        return torch.cat([F.interpolate(mask, size=mean.shape[-2:], mode="nearest"), left], dim=1)


def hole(height: int, width: int, *place: object) -> Any:
    """(1, 1, height, width) of zeros with a rectangle or an ellipse of ones; one time in four all ones."""
    import torch

    dice = seeds.dice("hole", *place)
    if dice.random() < 0.25:
        return torch.ones(1, 1, height, width)
    tall, wide = (max(1, int(side * dice.uniform(0.3, 0.9))) for side in (height, width))
    top, left = dice.randint(0, height - tall), dice.randint(0, width - wide)
    rows = (torch.arange(height)[:, None] - top + 0.5) / tall * 2.0 - 1.0
    columns = (torch.arange(width)[None] - left + 0.5) / wide * 2.0 - 1.0
    ellipse = dice.random() < 0.5
    inside = rows**2 + columns**2 <= 1.0 if ellipse else (rows.abs() <= 1.0) & (columns.abs() <= 1.0)
    return inside.float()[None, None]
