"""Pivotal tuning: token vectors first, then low-rank layers around them, alone or jointly (cloneofsimo/lora; arXiv 2106.05744).

``tokens.only_steps`` is the length of the first stage (0: joint from the start), ``tokens.joint`` whether the tokens go on in the second.
"""

from __future__ import annotations

from hubtool.training.bases import FAMILIES
from hubtool.training.config import Config
from hubtool.training.methods.base import ALL, Method
from hubtool.training.parts import tokens
from hubtool.training.parts.low_rank import LowRankPart
from hubtool.training.parts.tokens import TokensPart


def _moving(config: Config, step: int) -> frozenset[str]:
    if step < config.tokens.only_steps:
        return frozenset({"tokens"})
    return ALL if config.tokens.joint else ALL - {"tokens"}


def _check(config: Config) -> None:
    tokens.check(config.tokens)


METHOD = Method(
    "pivotal",
    "token vectors and low-rank layers, one after the other or jointly",
    FAMILIES.keys(),
    (TokensPart, LowRankPart),
    moving=_moving,
    trains=tuple(ALL),
    check=_check,
)
