"""DreamBooth (arXiv 2208.12242) on low-rank layers: a subject from a few images, the prior preserved with images of its class."""

from __future__ import annotations

from hubtool.training.bases import FAMILIES
from hubtool.training.methods.base import Method, need_prior
from hubtool.training.parts.low_rank import LowRankPart

METHOD = Method(
    "dreambooth",
    "a subject from a few images, with prior preservation (low-rank layers)",
    FAMILIES.keys(),
    (LowRankPart,),
    check=need_prior,
)
