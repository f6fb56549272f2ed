"""DreamBooth (arXiv 2208.12242), on low-rank layers or with ``adapter.full`` on all weights: a subject from a few images, the prior preserved with images of its class."""

from __future__ import annotations

from hubtool.training.bases import FAMILIES
from hubtool.training.bases.base import Base
from hubtool.training.config import Config
from hubtool.training.methods.base import Method, need_prior
from hubtool.training.parts.base import Part
from hubtool.training.parts.low_rank import LowRankPart
from hubtool.training.parts.weights import WeightsPart


def _part(base: Base, config: Config) -> Part:
    return WeightsPart(base, config) if config.adapter.full else LowRankPart(base, config)


METHOD = Method(
    "dreambooth",
    "a subject from a few images, with prior preservation (low-rank layers, or all weights)",
    FAMILIES.keys(),
    (_part,),
    check=need_prior,
    full=True,
)
