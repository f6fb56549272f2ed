"""The UNets of the Stable Diffusion families, as modules on the meta device: no weights, no network."""

from __future__ import annotations

from typing import Any

from tests.support.models import MODELS, build

UNETS = ("sd1", "sd2", "sdxl", "sdxl-refiner")


def unet(family: str) -> Any:
    """The family's UNet: names, shapes and configuration, no memory."""
    return build(MODELS[f"{family}-unet"])
