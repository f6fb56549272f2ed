"""LoRA (arXiv 2106.09685), LoCon with ``adapter.conv_rank``, DoRA with ``adapter.dora``: low-rank layers from images with captions."""

from __future__ import annotations

from hubtool.training.bases import FAMILIES
from hubtool.training.methods.base import Method
from hubtool.training.parts.low_rank import LowRankPart

METHOD = Method(
    "lora",
    "low-rank layers (LoRA, LoCon, DoRA) from captioned images",
    FAMILIES.keys(),
    (LowRankPart,),
)
