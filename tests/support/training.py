"""Images, configurations and whole tiny pipelines for the tests of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hubtool.pipelines.tiny import RECIPES, build
from hubtool.training.config import Config, from_mapping, merged, settings


def pictures(folder: Path, count: int = 3, size: tuple[int, int] = (64, 64), colours: Sequence[int] = ()) -> Path:
    """Noise, or plain pictures of the given greys."""
    folder.mkdir(parents=True, exist_ok=True)
    for at in range(count):
        if colours:
            values = np.full((size[1], size[0], 3), colours[at % len(colours)], dtype=np.uint8)
        else:
            values = np.random.default_rng(at).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"cat_{at}.png")
    return folder


def config(tmp: Path, method: str = "lora", *pairs: str, images: Path | None = None) -> Config:
    """A run on tiny pictures that writes below ``tmp``; ``pairs`` as with --set."""
    own = {
        "method": method,
        "output": {"folder": str(tmp / "out")},
        "data": {"folder": str(images or pictures(tmp / "images")), "resolution": 64},
        "adapter": {"rank": 2, "alpha": 2.0, "only": ["*.up_blocks.[12].attentions.2.*", "transformer.*blocks.0.*", "text_encoder*.layers.0.*"]},
        "tokens": {"names": ["<cat>"]},
        "run": {"steps": 4, "checkpoint_every": 2},
        "validation": {"steps": 1},
    }  # fmt: skip
    return from_mapping(merged(own, settings(pairs)))


def prior(tmp: Path) -> tuple[str, str]:
    """What gives a configuration class images."""
    return f"data.class_folder={pictures(tmp / 'class', 2, colours=(40, 90))}", "data.class_prompt=a dog"


def whole(family: str) -> Any:
    """A tiny pipeline with everything that training needs."""
    assert RECIPES[family].whole
    return build(family)


def inpainting() -> Any:
    """SD 1 with nine input channels."""
    from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel

    parts = dict(build("sd1").components)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts["unet"] = UNet2DConditionModel.from_config({**parts["unet"].config, "in_channels": 9}).eval()
    pipe = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def bits(pipe: Any) -> dict[str, torch.Tensor]:
    """Copies of all weights of all components, the VAE's too."""
    models = {name: one for name, one in pipe.components.items() if isinstance(one, torch.nn.Module)}
    return {f"{name}.{key}": value.clone() for name, one in models.items() for key, value in one.state_dict().items()}
