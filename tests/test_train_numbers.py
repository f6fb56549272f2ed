"""How precisely a run computes, what masks weigh, and how rates move."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from hubtool.pipelines.tiny import build
from hubtool.training import loop, optimiser
from hubtool.training.methods import method
from hubtool.training.session import session
from tests.support.training import config, pictures


@pytest.mark.parametrize("precision", ["bf16"])
def test_mixed_precision_keeps_the_trained_parameters_in_fp32(precision: str, tmp_path: Path) -> None:
    settings = config(
        tmp_path, "lora", f"run.precision={precision}", "adapter.text_encoders=true", "run.checkpointing=true"
    )
    with session(build("sd1"), settings, method("lora"), lambda: None) as made:
        done = loop.update(made, 0)
        assert {p.dtype for p in made.parameters.values()} == {torch.float32}
        assert made.pipe.unet.conv_in.weight.dtype == torch.bfloat16
        assert math.isfinite(done.loss)


def test_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    found = []
    for spare in ("false", "true"):
        settings = config(tmp_path, "lora", f"run.checkpointing={spare}", "adapter.text_encoders=true")
        with session(build("sd1"), settings, method("lora"), lambda: None) as made:
            loop._gradients(made, 0)
            found.append({name: p.grad.clone() for name, p in made.parameters.items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_masks_weigh_the_loss(tmp_path: Path) -> None:
    from PIL import Image

    images = pictures(tmp_path / "masked", 1)
    left = Image.new("L", (64, 64), 0)
    left.paste(255, (0, 0, 32, 64))
    left.save(images / "cat_0.mask.png")
    settings = config(tmp_path, "lora", "data.masks=true", "data.mask_floor=0", images=images)
    with session(build("sd1"), settings, method("lora"), lambda: None) as made, torch.no_grad():
        samples = made.own.batch(0)
        masked = float(loop.image_losses(made, samples)[0])
        halves = [float(cut_loss(made, samples[0], part)) for part in (slice(0, 4), slice(4, 8))]
        assert math.isclose(masked, halves[0], rel_tol=1e-5)
        assert not math.isclose(masked, halves[1], rel_tol=1e-3)


def cut_loss(made: Any, sample: Any, columns: slice) -> Any:
    from hubtool.training import loss

    kept: list[Any] = []
    own = loss.per_image
    try:
        loss.per_image = lambda prediction, target, *rest: (
            kept.append((prediction, target)) or own(prediction, target, *rest)
        )
        loop.image_losses(made, [sample])
    finally:
        loss.per_image = own
    prediction, target = kept[0]
    return ((prediction - target)[..., columns] ** 2).mean()


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "restarts", "polynomial"])
def test_rates_rise_over_the_warm_up_and_fall_to_the_end(schedule: str) -> None:
    from hubtool.training.config import Optimiser

    settings = Optimiser(schedule=schedule, warmup=4, final=0.1)
    rates = [optimiser.factor(settings, step, 104) for step in range(105)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(rates[4:]))
    assert math.isclose(rates[104], 1.0 if schedule == "constant" else 0.1)
