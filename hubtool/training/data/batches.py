"""Batches by number: batch 1000 is the same whether or not batches 0 to 999 were ever asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from hubtool.training import seeds
from hubtool.training.config import Config, Data
from hubtool.training.data import buckets, captions, images
from hubtool.training.data.images import Cut
from hubtool.training.data.items import Item

_FACTOR = 8  # pixels per latent
_STEP = 64  # buckets are multiples of this, as everywhere


@dataclass(frozen=True, slots=True)
class Sample:
    """One image on its way into the loss. ``index``: which sample of the whole run this is; it seeds the noise."""

    item: Item
    cut: Cut
    caption: str
    index: int


class Batches:
    """Deals out the images of one folder. ``tokens`` fill the captions; ``name`` keeps two folders' random numbers apart."""

    def __init__(self, items: Sequence[Item], config: Config, tokens: Sequence[str], name: str = "data") -> None:
        self.items, self.config, self.tokens, self.name = list(items), config, tuple(tokens), name
        self.step = bucket_step(config.data.resolution)
        self.of_bucket: dict[tuple[int, int], list[int]] = {}
        for at, item in enumerate(self.items):
            self.of_bucket.setdefault(self._bucket(item), []).extend([at] * (item.repeats * config.data.repeats))
        self._order = lru_cache(maxsize=2)(self._epoch)

    @property
    def per_epoch(self) -> int:
        """Batches until every image was seen."""
        size = self.config.run.batch
        return sum(-(-len(members) // size) for members in self.of_bucket.values())

    def batch(self, number: int) -> list[Sample]:
        """Batch ``number`` of the run: images of one bucket. The last one of a bucket may be smaller."""
        epoch, place = divmod(number, self.per_epoch)
        bucket, members = self._order(epoch)[place]
        first = number * self.config.run.batch
        return [self._sample(member, bucket, first + at) for at, member in enumerate(members)]

    def alike(self, samples: Sequence[Sample]) -> list[Sample]:
        """As many samples of this folder, cut like those given: the class images beside a batch."""
        size = len(self.items)
        return [self._sample((one.index * 7919 + 13) % size, one.cut.bucket, one.index) for one in samples]

    def _bucket(self, item: Item) -> tuple[int, int]:
        data = self.config.data
        return buckets.nearest(item.size, data.resolution, self.step, square=not data.buckets)

    def _epoch(self, epoch: int) -> list[tuple[tuple[int, int], list[int]]]:
        size, dice = self.config.run.batch, seeds.dice(self.config.run.seed, self.name, "order", epoch)
        dealt = []
        for bucket, members in sorted(self.of_bucket.items()):
            shuffled = dice.sample(members, len(members))
            dealt += [(bucket, shuffled[at : at + size]) for at in range(0, len(shuffled), size)]
        dice.shuffle(dealt)
        return dealt

    def _sample(self, member: int, bucket: tuple[int, int], index: int) -> Sample:
        data, item = self.config.data, self.items[member]
        dice = seeds.dice(self.config.run.seed, self.name, "sample", index)
        across, down = (dice.random(), dice.random()) if data.crop == "random" else (0.5, 0.5)
        how = images.cut(item, bucket, across, down, data.flip and dice.random() < 0.5)
        return Sample(item, how, self._caption(item, data, index), index)

    def _caption(self, item: Item, data: Data, index: int) -> str:
        if self.name == "class":
            return data.class_prompt
        return captions.caption(item, data, self.tokens, seeds.dice(self.config.run.seed, self.name, "words", index))


def bucket_step(resolution: int) -> int:
    """64 pixels; less where the pictures themselves are small."""
    return min(_STEP, max(_FACTOR, resolution // 4 // _FACTOR * _FACTOR))
