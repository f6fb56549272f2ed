"""Configurations, captions, batches, objectives, estimates, and the command: the parts of training that need no loop."""

from __future__ import annotations

import dataclasses
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from hubtool.errors import CorruptFile, FileMissing, UsageProblem
from hubtool.ops.recipes.schema import schema
from hubtool.pipelines.tiny import build
from hubtool.training import config as configs
from hubtool.training import objectives
from hubtool.training.config import Config, Data, Objective, from_mapping
from hubtool.training.data import captions
from hubtool.training.data.batches import Batches
from hubtool.training.data.items import Item, collect
from hubtool.training.loss import per_image
from hubtool.training.methods import METHODS
from tests.support.training import config, pictures


def test_the_schema_knows_exactly_the_words_of_the_configuration() -> None:
    document = schema("train")
    Draft202012Validator.check_schema(dict(document))
    for field in dataclasses.fields(Config):
        section = getattr(Config(), field.name)
        words = document["properties"][field.name].get("properties")
        if words is not None:
            assert list(words) == [one.name for one in dataclasses.fields(section)]
            assert all(node.get("description") for node in words.values())
    assert set(document["properties"]["method"]["enum"]) == METHODS.keys()


def test_the_defaults_fit_the_schema_and_survive_toml() -> None:
    settings = Config()
    assert not list(Draft202012Validator(dict(schema("train"))).iter_errors(settings.to_json()))
    assert from_mapping(tomllib.loads(configs.to_toml(settings))) == settings


@given(st.text(), st.lists(st.text(), max_size=4), st.floats(0, 1), st.integers(0, 2**63 - 1))
def test_any_text_and_number_survives_toml(text: str, words: list[str], share: float, seed: int) -> None:
    document = {"data": {"class_prompt": text, "template": words, "caption_dropout": share}, "run": {"seed": seed}}
    try:
        text.encode()
        "".join(words).encode()
    except UnicodeEncodeError:
        return
    settings = from_mapping(document)
    assert from_mapping(tomllib.loads(configs.to_toml(settings))) == settings


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ({"run": {"stpes": 3}}, "run.stpes: not a word"),
        ({"run": {"steps": 0}}, "run.steps: 0 is under 1"),
        ({"method": "magic"}, "method: 'magic' is none of"),
        ({"data": {"crop": "left"}}, "data.crop: 'left' is none of centre, random"),
        ({"optimiser": {"rate": "fast"}}, "optimiser.rate: 'fast' is no number"),
    ],
)
def test_a_wrong_word_is_refused_with_its_place(document: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageProblem, match=complaint):
        from_mapping(document)


def test_settings_are_toml_or_plain_text() -> None:
    found = configs.settings(
        ["run.steps=3", "data.class_prompt=a photo of a dog", "output.trigger=['a','b']", "base=x/y"]
    )
    assert found == {
        "run": {"steps": 3},
        "data": {"class_prompt": "a photo of a dog"},
        "output": {"trigger": ["a", "b"]},
        "base": "x/y",
    }
    with pytest.raises(UsageProblem):
        configs.settings(["run.steps"])


def test_configuration_files_that_are_none_raise(tmp_path: Path) -> None:
    with pytest.raises(FileMissing):
        configs.read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(CorruptFile):
        configs.read(tmp_path / "bad.toml")


def item(name: str = "a_black-cat.png", caption: str | None = None) -> Item:
    return Item(Path(name), (64, 64), caption)


@pytest.mark.parametrize(
    ("own", "data", "tokens", "expected"),
    [
        ("from a file", Data(), (), "from a file"),
        (None, Data(), (), "a black cat"),
        (None, Data(template=("{token} as {name}",)), ("<x>", "<y>"), "<x> <y> as a black cat"),
        ("from a file", Data(captions="template", template=("t",)), (), "t"),
        ("from a file", Data(captions="names"), (), "a black cat"),
        ("from a file", Data(captions="none"), (), ""),
        ("own {token}", Data(), ("<x>",), "own <x>"),
        ("own", Data(caption_dropout=1.0), (), ""),
    ],
)
def test_captions_come_from_where_they_are_asked(
    own: str | None, data: Data, tokens: tuple[str, ...], expected: str
) -> None:
    assert captions.caption(item(caption=own), data, tokens, random.Random(0)) == expected


def test_a_missing_caption_file_is_an_error_when_files_are_asked() -> None:
    with pytest.raises(UsageProblem, match="has no caption"):
        captions.caption(item(), Data(captions="files"), (), random.Random(0))


def test_tags_are_shuffled_behind_the_kept_ones() -> None:
    data = Data(shuffle_tags=True, keep_tags=2)
    made = {captions.caption(item(caption="a, b, c, d, e"), data, (), random.Random(seed)) for seed in range(20)}
    assert len(made) > 3
    assert all(one.startswith("a, b, ") and sorted(one.split(", ")) == list("abcde") for one in made)


def test_captions_stay_with_their_images_whatever_their_names(tmp_path: Path) -> None:
    root = pictures(tmp_path / "in", 12)
    for at in range(12):
        (root / f"cat_{at}.txt").write_text(f"number {at}")
    assert {one.path.stem: one.caption for one in collect(root)} == {f"cat_{at}": f"number {at}" for at in range(12)}


def test_metadata_and_repeating_folders_are_read(tmp_path: Path) -> None:
    root = pictures(tmp_path / "in", 1)
    pictures(root / "5_dogs", 1)
    (root / "metadata.jsonl").write_text('{"file_name": "5_dogs/cat_0.png", "text": "a dog"}\n\n')
    assert [(one.caption, one.repeats) for one in collect(root)] == [("a dog", 5), (None, 1)]
    (root / "metadata.jsonl").write_text("{")
    with pytest.raises(CorruptFile, match="line 1"):
        collect(root)


def test_every_image_comes_once_an_epoch_in_batches_of_one_bucket(tmp_path: Path) -> None:
    root = pictures(tmp_path / "in", 5)
    pictures(root / "wide", 3, (128, 64))
    own = Batches(collect(root), config(tmp_path, "lora", "run.batch=2", images=root), ())
    for epoch in range(2):
        dealt = [own.batch(epoch * own.per_epoch + at) for at in range(own.per_epoch)]
        assert sorted(str(one.item.path) for batch in dealt for one in batch) == sorted(
            str(one.path) for one in own.items
        )
        assert all(len({one.cut.bucket for one in batch}) == 1 for batch in dealt)
    orders = [
        [one.item.path.name for at in range(own.per_epoch) for one in own.batch(n * own.per_epoch + at)]
        for n in range(6)
    ]
    assert len({tuple(order) for order in orders}) > 1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_diffusion_targets_are_the_schedulers_own(prediction: str) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type=prediction, beta_schedule="scaled_linear")
    latents, noise = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    uniform = torch.rand(4)
    task = objectives.make(scheduler, Objective()).task(latents, noise, uniform, uniform)
    torch.testing.assert_close(task.noisy, scheduler.add_noise(latents, noise, task.times))
    wanted = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, task.times)
    torch.testing.assert_close(task.target, wanted)
    assert torch.equal(task.weight, torch.ones(4))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_the_formula(prediction: str) -> None:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler(prediction_type=prediction)
    uniform = torch.tensor([0.0, 0.2, 0.5, 0.9, 0.9999])
    zeros = torch.zeros(5, 1, 2, 2)
    task = objectives.make(scheduler, Objective(snr_gamma=5.0)).task(zeros, zeros, uniform, uniform)
    snr = compute_snr(scheduler, task.times)
    least = torch.minimum(snr, torch.tensor(5.0))
    torch.testing.assert_close(task.weight, least / (snr if prediction == "epsilon" else snr + 1))


def test_flow_matching_goes_straight_from_image_to_noise() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    goal = objectives.make(FlowMatchEulerDiscreteScheduler(shift=3.0), Objective(sampling="uniform"))
    latents, noise, uniform = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.25, 0.5])
    task = goal.task(latents, noise, uniform, uniform)
    share = 3 * uniform / (1 + 2 * uniform)
    torch.testing.assert_close(task.times, share * 1000)
    torch.testing.assert_close(task.target, noise - latents)
    torch.testing.assert_close(task.noisy - share.view(-1, 1, 1, 1) * task.target, latents)


def test_flow_bases_are_not_trained_on_epsilon() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    with pytest.raises(UsageProblem, match="made for flow"):
        objectives.make(FlowMatchEulerDiscreteScheduler(), Objective(prediction="epsilon"))


def test_a_masked_loss_is_the_mean_of_what_the_mask_shows() -> None:
    prediction, target, mask = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.zeros(2, 1, 8, 8)
    mask[..., :3] = 1.0
    found = per_image(prediction, target, torch.tensor([1.0, 2.0]), mask)
    wanted = ((prediction - target)[..., :3] ** 2).flatten(1).mean(1) * torch.tensor([1.0, 2.0])
    torch.testing.assert_close(found, wanted)


def test_flux_latents_are_packed_and_unpacked_as_its_pipeline_does() -> None:
    from diffusers import FluxPipeline

    from hubtool.training.bases.flux import unpacked

    latents = torch.randn(2, 16, 6, 4)
    packed = FluxPipeline._pack_latents(latents, 2, 16, 6, 4)
    assert torch.equal(unpacked(packed, 6, 4), latents)


def test_the_average_follows_its_decay_and_gives_the_parameters_back() -> None:
    from hubtool.training.average import Average

    value = torch.nn.Parameter(torch.zeros(3))
    average, expected = Average({"value": value}, 0.5), 0.0
    for step in range(6):
        value.data.fill_(step + 1.0)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step + 1)
    with average.applied():
        torch.testing.assert_close(value.detach(), torch.full((3,), expected))
    assert torch.equal(value.detach(), torch.full((3,), 6.0))


def test_norm_decay_pulls_token_vectors_and_keeps_their_direction(tmp_path: Path) -> None:
    from hubtool.training.methods import method
    from hubtool.training.session import session

    settings = config(
        tmp_path,
        "textual-inversion",
        "tokens.norm_decay=0.25",
        "tokens.norm=2.0",
        "tokens.vectors=2",
        "tokens.noise=1.0",
    )
    with session(build("sd1"), settings, method("textual-inversion"), lambda: None) as made:
        rows = made.parts[0].rows["text_encoder"]
        before = rows.detach().clone()
        made.parts[0].after_step(0)
        norms = before.norm(dim=1), rows.detach().norm(dim=1)
        torch.testing.assert_close(norms[1], norms[0] + 0.25 * (2.0 - norms[0]))
        torch.testing.assert_close(torch.cosine_similarity(before, rows.detach()), torch.ones(2))


def test_the_first_token_gives_keys_and_values_no_gradient(tmp_path: Path) -> None:
    from hubtool.training.methods import method
    from hubtool.training.session import session

    more = ("data.class_prompt=a dog", f"data.class_folder={pictures(tmp_path / 'class', 1)}")
    with session(
        build("sd1"), config(tmp_path, "custom-diffusion", *more), method("custom-diffusion"), lambda: None
    ) as made:
        module = next(iter(made.parts[1].modules.values()))
        states = torch.randn(1, 3, module.weight.shape[1])
        module(states).sum().backward()
        torch.testing.assert_close(module.weight.grad[0], states[0, 1:].sum(0))
