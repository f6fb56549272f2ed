"""Aesthetic gradients in tiny pipelines: the loop of the paper written out, and an encoder that has its own bits again, whatever happened."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from hubtool.actions.load import load, unload
from hubtool.errors import BadValues, HubtoolError, LoadMismatch, ShapeMismatch, Unsupported, UsageProblem
from hubtool.pipelines.schedules import scheduled
from tests.support import kinds, tiny

RATE = 1e-3
PROJECTION = kinds.values(kinds.WIDTH, kinds.WIDTH, seed=8, scale=kinds.WIDTH**-0.5)


@pytest.fixture
def pipe() -> Any:
    return kinds.wide()


def vector(seed: int = 0) -> torch.Tensor:
    """With the peak at 644 that CLIP's image embeddings have."""
    return torch.nn.functional.one_hot(torch.tensor([644]), kinds.WIDTH) * 20.0 + kinds.values(
        1, kinds.WIDTH, seed=seed
    )


def embedding(folder: Path, name: str = "aesthetic.pt", seed: int = 0) -> Path:
    return kinds.saved(folder / name, vector(seed))


@pytest.fixture
def how(tmp_path: Path) -> dict[str, Any]:
    clip = kinds.saved(tmp_path / "clip.pt", {"text_projection.weight": PROJECTION, "logit_scale": torch.ones(())})
    return {"steps": 3, "rate": RATE, "projection": clip}


def tuned(encoder: Any, pipe: Any, prompt: str, aim: torch.Tensor, steps: int = 3) -> Any:
    """The reference's loop, on a copy: Adam on the text model's parameters, minus the cosine behind the projection."""
    encoder = copy.deepcopy(encoder)
    words = pipe.tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    aim = aim / aim.norm()
    adam = torch.optim.Adam(encoder.parameters(), lr=RATE)
    for _ in range(steps):
        adam.zero_grad()
        text = encoder(words).pooler_output @ PROJECTION.T
        loss = -(text / text.norm(dim=-1, keepdim=True)) @ aim.T
        loss.mean().backward()
        adam.step()
    return encoder


def seen(encoder: Any, pipe: Any, prompt: str) -> torch.Tensor:
    return tiny.encoded(encoder, pipe.tokenizer, prompt).last_hidden_state


def encoded(pipe: Any, prompt: Any, negative: Any = None, **more: Any) -> Any:
    with torch.no_grad():
        return pipe.encode_prompt(prompt, "cpu", 1, True, negative_prompt=negative, **more)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_the_prompt_is_that_of_an_encoder_tuned_by_the_papers_loop(
    pipe: Any, tmp_path: Path, how: dict[str, Any], strength: float
) -> None:
    plain = seen(pipe.text_encoder, pipe, "a cat")
    other = seen(tuned(pipe.text_encoder, pipe, "a cat", vector()), pipe, "a cat")
    report = load(pipe, embedding(tmp_path), strength=strength, settings=how)
    mine, negative = encoded(pipe, "a cat", "a dog")
    close(mine, plain + strength * (other - plain))
    assert (other - plain).abs().max() > 1e-2
    assert torch.equal(negative, seen(pipe.text_encoder, pipe, "a dog"))
    assert report.kind == "aesthetic_embedding"
    assert any("3 steps at rate 0.001" in finding.message for finding in report.findings)


def test_each_prompt_of_a_batch_is_tuned_for_alone_and_an_empty_one_is_left(
    pipe: Any, tmp_path: Path, how: dict[str, Any]
) -> None:
    load(pipe, embedding(tmp_path), settings=how)
    batch, _ = encoded(pipe, ["a cat", "", "a dog", "a cat"])
    for row, prompt in zip(batch, ["a cat", "", "a dog", "a cat"], strict=True):
        torch.testing.assert_close(row[None], encoded(pipe, prompt)[0], atol=1e-5, rtol=1e-5)
    close(batch[1][None], seen(pipe.text_encoder, pipe, ""))
    with torch.no_grad():
        twice, _ = pipe.encode_prompt(["a cat", "a dog"], "cpu", 2, True)
    close(twice, batch[[0, 0, 2, 2]])


def test_a_run_uses_it_and_leaves_the_weights_bit_for_bit(pipe: Any, tmp_path: Path, how: dict[str, Any]) -> None:
    before, plain, kind = tiny.weights(pipe), kinds.picture(pipe), type(pipe)
    places = [one.data_ptr() for one in pipe.text_encoder.parameters()]
    other = seen(tuned(pipe.text_encoder, pipe, "a cat", vector()), pipe, "a cat")
    negative = seen(pipe.text_encoder, pipe, "")
    expected = kinds.picture(pipe, None, prompt_embeds=other, negative_prompt_embeds=negative)
    load(pipe, embedding(tmp_path), settings=how)
    with torch.inference_mode():
        mine = kinds.picture(pipe)
    torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(mine, plain)
    assert tiny.same(tiny.weights(pipe), before)
    assert [one.data_ptr() for one in pipe.text_encoder.parameters()] == places
    assert all(one.requires_grad and one.grad is None for one in pipe.text_encoder.parameters())
    unload(pipe, "aesthetic")
    assert type(pipe) is kind
    assert torch.equal(kinds.picture(pipe), plain)


def test_an_error_in_the_middle_leaves_the_weights_bit_for_bit(
    pipe: Any, tmp_path: Path, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tiny.weights(pipe)
    load(pipe, embedding(tmp_path), settings=how)
    step, done = torch.optim.Adam.step, list[Any]()

    def failing(self: Any, *args: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(step(self, *args))

    monkeypatch.setattr(torch.optim.Adam, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        kinds.picture(pipe)
    assert done
    assert tiny.same(tiny.weights(pipe), before)
    assert all(one.requires_grad and one.grad is None for one in pipe.text_encoder.parameters())


def test_half_precision_is_tuned_in_full_and_comes_back(pipe: Any, tmp_path: Path, how: dict[str, Any]) -> None:
    pipe.text_encoder.to(torch.bfloat16)
    before = tiny.weights(pipe)
    wide = copy.deepcopy(pipe.text_encoder).float()
    expected = seen(tuned(wide, pipe, "a cat", vector()), pipe, "a cat")
    load(pipe, embedding(tmp_path), settings=how)
    mine, _ = encoded(pipe, "a cat")
    assert mine.dtype == torch.bfloat16
    torch.testing.assert_close(mine.float(), expected, atol=2e-2, rtol=2e-2)
    assert tiny.same(tiny.weights(pipe), before)


def test_several_tune_one_after_another_the_last_loaded_first(pipe: Any, tmp_path: Path, how: dict[str, Any]) -> None:
    plain = seen(pipe.text_encoder, pipe, "a cat")
    first = tuned(pipe.text_encoder, pipe, "a cat", vector(5))
    second = seen(tuned(first, pipe, "a cat", vector()), pipe, "a cat")
    load(pipe, embedding(tmp_path), settings=how)
    alone = encoded(pipe, "a cat")[0]
    load(pipe, embedding(tmp_path, "second.pt", seed=5), settings=how, strength=1.0)
    close(encoded(pipe, "a cat")[0], second)
    unload(pipe, "second")
    close(encoded(pipe, "a cat")[0], alone)
    unload(pipe, "aesthetic")
    assert torch.equal(encoded(pipe, "a cat")[0], plain)


def test_a_slerp_goes_along_the_arc(pipe: Any, tmp_path: Path, how: dict[str, Any]) -> None:
    plain = seen(pipe.text_encoder, pipe, "a cat").double()
    other = seen(tuned(pipe.text_encoder, pipe, "a cat", vector()), pipe, "a cat").double()
    cosine = (plain * other).sum(-1, keepdim=True) / plain.norm(dim=-1, keepdim=True) / other.norm(dim=-1, keepdim=True)
    angle = cosine.acos()
    arc = ((0.6 * angle).sin() * plain + (0.4 * angle).sin() * other) / angle.sin()
    load(pipe, embedding(tmp_path), settings={**how, "slerp": True}, strength=0.4)
    moved = (angle > 1e-2).expand_as(plain)
    assert bool(moved.any())
    torch.testing.assert_close(encoded(pipe, "a cat")[0][moved], arc[moved].float(), atol=1e-3, rtol=1e-3)


def test_factors_of_a_lora_act_and_stay_as_they_are(pipe: Any, tmp_path: Path, how: dict[str, Any]) -> None:
    made = tiny.make(pipe, ["text_encoder"], only="q_proj")
    load(pipe, made.adapter, name="lora")
    before, plain = tiny.weights(pipe), encoded(pipe, "a cat")[0]
    load(pipe, embedding(tmp_path), settings=how)
    assert not torch.equal(encoded(pipe, "a cat")[0], plain)
    assert tiny.same(tiny.weights(pipe), before)
    unload(pipe, "lora")
    mine = encoded(pipe, "a cat")[0]
    close(mine, seen(tuned(pipe.text_encoder, pipe, "a cat", vector()), pipe, "a cat"))


def test_the_projection_may_lie_beside_the_file_or_in_the_encoder(
    pipe: Any, tmp_path: Path, how: dict[str, Any]
) -> None:
    load(pipe, embedding(tmp_path), settings=how)
    expected = encoded(pipe, "a cat")[0]
    unload(pipe, "aesthetic")
    own = {key: value for key, value in how.items() if key != "projection"}
    kinds.saved(tmp_path / "text_projection.pt", {"text_projection": PROJECTION.T.contiguous()})  # as CLIP's own files
    load(pipe, embedding(tmp_path), settings=own)
    assert torch.equal(encoded(pipe, "a cat")[0], expected)
    unload(pipe, "aesthetic")
    (tmp_path / "text_projection.pt").unlink()
    pipe.text_encoder.text_projection = torch.nn.Linear(kinds.WIDTH, kinds.WIDTH, bias=False)
    pipe.text_encoder.text_projection.weight.data.copy_(PROJECTION)
    before = tiny.weights(pipe)
    load(pipe, embedding(tmp_path), settings=own)
    assert torch.equal(encoded(pipe, "a cat")[0], expected)
    assert tiny.same(tiny.weights(pipe), before)


def test_without_a_projection_it_says_which_file_has_one(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="no text_projection") as caught:
        load(pipe, embedding(tmp_path))
    assert "clip-vit-large-patch14" in str(caught.value.hint)
    other = kinds.saved(tmp_path / "other.pt", {"weight": torch.ones(2, 2)})
    with pytest.raises(Unsupported, match="no text_projection in this file"):
        load(pipe, embedding(tmp_path), settings={"projection": other})


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"steps": 0}, BadValues),
        ({"rate": -1.0}, BadValues),
        ({"steps": "many"}, BadValues),
        ({"pace": 3}, UsageProblem),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    pipe: Any, tmp_path: Path, how: dict[str, Any], more: dict[str, Any], error: type[HubtoolError]
) -> None:
    with pytest.raises(error):
        load(pipe, embedding(tmp_path), settings={**how, **more})


def test_other_pipelines_and_widths_are_refused(tmp_path: Path, how: dict[str, Any]) -> None:
    with pytest.raises(LoadMismatch):
        load(tiny.build("sdxl"), embedding(tmp_path), settings=how)
    with pytest.raises(ShapeMismatch, match="768 wide, the encoder 32"):
        load(tiny.build("sd1"), embedding(tmp_path), settings=how)


def test_it_needs_words_and_follows_no_schedule(pipe: Any, tmp_path: Path, how: dict[str, Any]) -> None:
    plain = encoded(pipe, "a cat")[0]
    load(pipe, embedding(tmp_path), settings=how)
    with pytest.raises(UsageProblem, match="need the prompt's words"):
        kinds.picture(pipe, None, prompt_embeds=plain, negative_prompt_embeds=plain)
    with pytest.raises(UsageProblem, match="before the first step"), scheduled(pipe, {"aesthetic": 0.5}, steps=2):
        pass


def test_real_files_of_the_author_load(shared: Path, pipe: Any, how: dict[str, Any]) -> None:
    for path in sorted((shared / "real" / "aesthetic").glob("*.pt")):
        report = load(pipe, path, settings={**how, "steps": 1})
        assert not torch.equal(encoded(pipe, "a cat")[0], seen(pipe.text_encoder, pipe, "a cat"))
        unload(pipe, report.name)
