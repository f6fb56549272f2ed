"""Textual inversion (arXiv 2208.01618): vectors of new tokens, nothing else."""

from __future__ import annotations

from hubtool.training.bases import FAMILIES
from hubtool.training.config import Config
from hubtool.training.methods.base import Method
from hubtool.training.parts import tokens
from hubtool.training.parts.tokens import TokensPart


def _check(config: Config) -> None:
    tokens.check(config.tokens)


METHOD = Method(
    "textual-inversion",
    "vectors of new tokens, any number for each",
    FAMILIES.keys(),
    (TokensPart,),
    trains=("tokens",),
    check=_check,
)
