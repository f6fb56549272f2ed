"""Images of the class, which prior preservation compares with: given, or made by the base itself before training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hubtool.errors import Unsupported, UsageProblem
from hubtool.training import seeds
from hubtool.training.config import Config
from hubtool.training.data.items import Item, collect, images

_FOLDER = "class"


def folder(config: Config) -> Path | None:
    """Where the class images are or will be; None without prior preservation."""
    if config.data.class_folder:
        return Path(config.data.class_folder)
    return Path(config.output.folder) / _FOLDER if config.data.class_prompt else None


def items(pipe: Any, config: Config, made: Callable[[], None]) -> list[Item]:
    """The class images, after making those that are missing; empty without prior preservation. ``made`` is called for each new one.

    Which images exist decides which are made: every image has a seed of its own, by its number. Raises ``UsageProblem`` when there is
    none and none can be made, ``Unsupported`` for bases that cannot make images from words alone.
    """
    place = folder(config)
    if place is None:
        return []
    if config.data.class_images:
        place.mkdir(parents=True, exist_ok=True)
        missing = config.data.class_images - sum(1 for _ in images(place))
        if missing > 0:
            _make(pipe, config, place, missing, made)
    if not place.is_dir():
        raise UsageProblem(
            "prior preservation needs class images", hint="--set data.class_images=200 makes them with the base"
        )
    return collect(place, files=False)


def _make(pipe: Any, config: Config, place: Path, missing: int, made: Callable[[], None]) -> None:
    import torch

    if not config.data.class_prompt:
        raise UsageProblem(f"{missing} class images are missing, and no data.class_prompt says what they show")
    if _needs_image(pipe):
        raise Unsupported("an inpainting base cannot make class images", hint="give them with data.class_folder")
    size, number = config.data.resolution, 0
    while missing > 0:
        path = place / f"class-{number:05}.png"
        if not path.exists():
            generator = torch.Generator().manual_seed(seeds.number(config.run.seed, "class", number))
            with quiet(pipe):
                picture = pipe(
                config.data.class_prompt, height=size, width=size, generator=generator,
                num_inference_steps=config.validation.steps,
            ).images[0]  # fmt: skip
            part = path.with_name(f".{path.name}")
            picture.save(part, format="PNG")
            part.replace(path)
            missing -= 1
            made()
        number += 1


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """The pipeline shows no progress of its own inside the block."""
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**bar, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**bar)


def _needs_image(pipe: Any) -> bool:
    unet = getattr(pipe, "unet", None)
    return unet is not None and unet.config.in_channels != 4
