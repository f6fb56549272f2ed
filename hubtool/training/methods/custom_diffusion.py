"""Custom Diffusion (arXiv 2212.04488): new tokens, and the keys and values of cross-attention, with class images."""

from __future__ import annotations

from hubtool.training.config import Config
from hubtool.training.methods.base import Method, need_prior
from hubtool.training.parts import tokens
from hubtool.training.parts.cross_attention import CrossAttentionPart
from hubtool.training.parts.tokens import TokensPart


def _check(config: Config) -> None:
    tokens.check(config.tokens)
    need_prior(config)


METHOD = Method(
    "custom-diffusion",
    "new tokens with the keys and values of cross-attention",
    ("sd1", "sd2", "sdxl"),
    (TokensPart, CrossAttentionPart),
    trains=("denoiser", "tokens"),
    check=_check,
)
