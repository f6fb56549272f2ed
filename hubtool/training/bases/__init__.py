"""What each architecture is told besides noisy latents: one file for the UNets of Stable Diffusion, one for SD 3, one for Flux."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hubtool.errors import Unsupported
from hubtool.pipelines.families import family_of
from hubtool.training.bases.base import Base

FAMILIES = {"sd1": "unet", "sd2": "unet", "sdxl": "unet", "sd3": "sd3", "flux1": "flux"}
__all__ = ["FAMILIES", "Base", "check_family", "make"]


def check_family(family: str | None) -> str:
    """``family``, if it can be trained. Raises ``Unsupported``."""
    if family not in FAMILIES:
        raise Unsupported(
            f"{family or 'a base of unknown family'} cannot be trained yet", hint=f"families: {', '.join(FAMILIES)}"
        )
    return family


def make(pipe: Any, guidance: float, clip_skip: int) -> Base:
    """The base inside ``pipe``. Raises ``Unsupported`` for another family."""
    family = check_family(family_of(pipe))
    module = import_module(f"hubtool.training.bases.{FAMILIES[family]}")
    made: Base = module.make(pipe, guidance, clip_skip)
    return made
