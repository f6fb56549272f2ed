"""Null-text inversions in tiny pipelines: a denoising loop written out, with an unconditional embedding of its own for every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hubtool.actions.load import load, unload
from hubtool.errors import BadValues, HubtoolError, LoadMismatch, ShapeMismatch, UsageProblem
from hubtool.pipelines.schedules import scheduled
from tests.support import kinds, tiny

GUIDANCE = 3.0
LATENT = kinds.values(1, 4, 8, 8, seed=4)


@pytest.fixture
def pipe() -> Any:
    return kinds.wide()


def uncond(steps: int = kinds.STEPS) -> list[torch.Tensor]:
    return [kinds.values(1, 77, kinds.WIDTH, seed=10 + i) for i in range(steps)]


def inversion(path: Path, **more: Any) -> Path:
    """As notebooks keep it."""
    return kinds.saved(path, {"uncond_embeddings": uncond(), "x_t": LATENT, "prompt": "a cat", **more})


def by_hand(pipe: Any, prompts: list[str], latent: torch.Tensor, steps: int = kinds.STEPS) -> torch.Tensor:
    """DDIM without noise, eta 0: guidance between the step's embedding and the prompt."""
    pipe.scheduler.set_timesteps(steps)
    rows = []
    for prompt in prompts:
        x, context = latent.clone(), tiny.encoded(pipe.text_encoder, pipe.tokenizer, prompt).last_hidden_state
        for empty, t in zip(uncond(steps), pipe.scheduler.timesteps, strict=True):
            with torch.no_grad():
                one, other = (pipe.unet(x, t, encoder_hidden_states=c).sample for c in (empty, context))
            ratio = pipe.scheduler.config.num_train_timesteps // steps
            now = pipe.scheduler.alphas_cumprod[t]
            before = int(t) - ratio
            then = pipe.scheduler.alphas_cumprod[before] if before >= 0 else pipe.scheduler.final_alpha_cumprod
            noise = one + GUIDANCE * (other - one)
            clean = (x - (1 - now).sqrt() * noise) / now.sqrt()
            x = then.sqrt() * clean + (1 - then).sqrt() * noise
        rows.append(x)
    return torch.cat(rows)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_run_is_the_loop_with_an_embedding_for_every_step(pipe: Any, tmp_path: Path) -> None:
    expected = by_hand(pipe, ["a cat"], LATENT)
    report = load(pipe, inversion(tmp_path / "cat.png.pt"))
    close(kinds.picture(pipe), expected)
    close(kinds.picture(pipe), expected)
    assert report.kind == "null_text"
    assert any("'a cat' gives the picture back" in finding.message for finding in report.findings)


@pytest.mark.parametrize("form", ["stacked", "list", "safetensors"])
def test_forms_without_a_latent_begin_where_they_are_told(pipe: Any, tmp_path: Path, form: str) -> None:
    from hubtool.actions.convert import convert

    path = kinds.saved(tmp_path / "cat.pt", torch.stack(uncond()) if form == "stacked" else uncond())
    if form == "safetensors":
        path = (convert(path, tmp_path / "cat.safetensors"), tmp_path / "cat.safetensors")[1]
    report = load(pipe, path)
    assert [finding.code for finding in report.findings if finding.severity == "warning"] == ["null-text-latent"]
    close(kinds.picture(pipe, latents=LATENT), by_hand(pipe, ["a cat"], LATENT))


def test_a_latent_that_is_given_comes_before_the_files(pipe: Any, tmp_path: Path) -> None:
    other = kinds.values(1, 4, 8, 8, seed=5)
    load(pipe, inversion(tmp_path / "cat.pt"))
    close(kinds.picture(pipe, latents=other), by_hand(pipe, ["a cat"], other))


def test_every_picture_of_a_batch_begins_there(pipe: Any, tmp_path: Path) -> None:
    load(pipe, inversion(tmp_path / "cat.pt"))
    both = by_hand(pipe, ["a cat", "a dog"], LATENT)
    close(kinds.picture(pipe, ["a cat", "a dog"]), both)
    close(kinds.picture(pipe, "a dog", num_images_per_prompt=2), both[[1, 1]])


def test_unloading_leaves_no_trace(pipe: Any, tmp_path: Path) -> None:
    plain, kind, count = kinds.picture(pipe), type(pipe), kinds.hooks(pipe)
    load(pipe, inversion(tmp_path / "cat.pt"))
    assert not torch.equal(kinds.picture(pipe), plain)
    assert kinds.hooks(pipe) == count
    unload(pipe, "cat")
    assert type(pipe) is kind
    assert torch.equal(kinds.picture(pipe), plain)


def test_beside_a_hypernetwork_and_a_lora_it_is_the_same_loop(pipe: Any, tmp_path: Path) -> None:
    load(pipe, tiny.make(pipe, ["unet"], only="attn1.to_q").adapter, name="lora")
    load(pipe, kinds.hypernetwork(tmp_path / "style.pt", (64,)))
    load(pipe, inversion(tmp_path / "cat.pt"))
    close(kinds.picture(pipe), by_hand(pipe, ["a cat"], LATENT))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"num_inference_steps": 5}, "embeddings for 3 steps, this run has 5"),
        ({"guidance_scale": 1.0}, "without guidance"),
        ({"negative_prompt": "a dog"}, "place of the negative prompt"),
        ({"height": 128}, "64 x 64 pixels, not 64 x 128"),
    ],
)
def test_a_run_it_is_not_for_is_explained_and_leaves_nothing(
    pipe: Any, tmp_path: Path, how: dict[str, Any], said: str
) -> None:
    count = kinds.hooks(pipe)
    load(pipe, inversion(tmp_path / "cat.pt"))
    with pytest.raises(UsageProblem, match=said):
        kinds.picture(pipe, **how)
    assert kinds.hooks(pipe) == count


def test_a_scheduler_that_takes_other_steps_is_refused_and_another_than_ddim_is_named(
    pipe: Any, tmp_path: Path
) -> None:
    from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler

    pipe.scheduler, count = EulerDiscreteScheduler.from_config(pipe.scheduler.config), kinds.hooks(pipe)
    report = load(pipe, inversion(tmp_path / "cat.pt"))
    assert "null-text-scheduler" in [finding.code for finding in report.findings]
    kinds.picture(pipe)
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(UsageProblem, match="this scheduler works in 5"):
        kinds.picture(pipe)
    assert kinds.hooks(pipe) == count


@pytest.mark.parametrize(
    ("tree", "how", "error"),
    [
        ({}, {"strength": 0.5}, UsageProblem),
        ({}, {"trainable": True}, HubtoolError),
        ({"x_t": LATENT * torch.nan}, {}, BadValues),
        ({"x_t": LATENT[:, :3]}, {}, ShapeMismatch),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(
    pipe: Any, tmp_path: Path, tree: dict[str, Any], how: dict[str, Any], error: type[HubtoolError]
) -> None:
    kind = type(pipe)
    with pytest.raises(error):
        load(pipe, inversion(tmp_path / "cat.pt", **tree), **how)
    assert type(pipe) is kind


def test_one_inversion_at_a_time_and_no_other_family(pipe: Any, tmp_path: Path) -> None:
    path = inversion(tmp_path / "cat.pt")
    load(pipe, path)
    with pytest.raises(UsageProblem, match="another null-text inversion is loaded"):
        load(pipe, path, name="again")
    with pytest.raises(UsageProblem, match="no strength"), scheduled(pipe, {"cat": 0.5}, steps=kinds.STEPS):
        pass
    with pytest.raises(ShapeMismatch, match="768 wide, the U-Net reads 32"):
        load(tiny.build("sd1"), path)
    with pytest.raises(LoadMismatch):
        load(tiny.build("sd2"), path)
