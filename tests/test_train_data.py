"""Configurations, captions, batches, objectives, estimates, and the command: the parts of training that need no loop."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from hubtool.actions import train as actions
from hubtool.cli.main import cli
from hubtool.errors import CorruptFile, FileMissing, HubError, HubtoolError, MissingExtra, UsageProblem
from hubtool.ops.recipes.schema import schema
from hubtool.pipelines.tiny import build
from hubtool.training import bases, objectives, opening
from hubtool.training import config as configs
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


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_estimate_counts_what_the_run_trains(family: str, tmp_path: Path) -> None:
    from hubtool.training.methods import method
    from hubtool.training.session import session

    pipe = build(family)
    pipe.save_pretrained(tmp_path / "base")
    settings = config(
        tmp_path, "pivotal", "adapter.text_encoders=true", f"base={tmp_path / 'base'}", "tokens.vectors=2"
    )
    found = actions.plan(settings)
    with session(pipe, settings, method("pivotal"), lambda: None) as made:
        assert found.parameters == sum(p.numel() for p in made.parameters.values())
        frozen = sum(
            p.numel() * p.element_size()
            for model in pipe.components.values()
            if isinstance(model, torch.nn.Module)
            for name, p in model.named_parameters()
            if "lora_" not in name
        )
    added = (
        4
        * 2
        * sum(
            e.get_input_embeddings().embedding_dim
            for e in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None))
            if e
        )
    )
    assert found.memory is not None
    assert abs(found.memory["frozen weights"] - frozen) <= added
    assert (found.steps, found.images, math.isclose(found.epochs, 4 / 3)) == (4, 3, True)


def test_checkpointing_and_small_batches_lower_the_estimate(tmp_path: Path) -> None:
    build("sd1").save_pretrained(tmp_path / "base")
    base = f"base={tmp_path / 'base'}"
    plain, spare, large = (
        actions.plan(config(tmp_path, "lora", base, *more)).memory["activations"]  # type: ignore[index]
        for more in ((), ("run.checkpointing=true",), ("run.batch=4",))
    )
    assert spare < plain / 2
    assert 3.5 * plain < large < 4.5 * plain


def test_the_estimate_is_what_autograd_keeps(tmp_path: Path) -> None:
    """Against a real forward pass on the CPU, counted the same way but with real tensors."""
    from hubtool.training import loop
    from hubtool.training.methods import method
    from hubtool.training.session import session

    pipe = build("sd1")
    pipe.save_pretrained(tmp_path / "base")
    settings = config(tmp_path, "lora", f"base={tmp_path / 'base'}", "adapter.only=[]")
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    with session(pipe, settings, method("lora"), lambda: None) as made:
        weights = {p.untyped_storage().data_ptr() for p in pipe.unet.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loop.batch_loss(made, 0)
    real = sum(size for place, size in kept.items() if place not in weights)
    memory = actions.plan(settings).memory
    assert memory is not None
    assert 0.7 * real < memory["activations"] < 1.3 * real


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


def test_missing_packages_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    with pytest.raises(MissingExtra) as caught:
        opening.need_packages()
    assert caught.value.hint == 'pip install "hubtool[train]"'


def test_an_optimiser_that_is_not_installed_names_the_command() -> None:
    from hubtool.training import optimiser

    with pytest.raises(MissingExtra) as caught:
        optimiser.make([], configs.Optimiser(name="adamw8bit"))
    assert caught.value.hint == "pip install bitsandbytes"


def test_a_repository_is_asked_for_its_class_before_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def answer(repository: str, name: str) -> str:
        asked.append(name)
        (tmp_path / "index.json").write_text(
            json.dumps({"_class_name": "WanPipeline", "transformer": ["diffusers", "X"]})
        )
        return str(tmp_path / "index.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer)
    with pytest.raises(HubtoolError, match="lora does not fit wan, which some/where is"):
        opening.opened("some/where", METHODS["lora"].families, "lora", torch.float32)
    assert asked == ["model_index.json"]


def test_a_repository_that_cannot_be_reached_is_the_hubs_error() -> None:
    with pytest.raises(HubError, match="cannot be asked"):
        opening.family("some/where")


def test_families_that_cannot_be_trained_are_named() -> None:
    with pytest.raises(HubtoolError, match="wan cannot be trained"):
        bases.check_family("wan")


def invoke(*words: str) -> Any:
    return CliRunner().invoke(cli, ["train", *words])


def test_the_command_trains_into_the_library_and_resumes(tmp_path: Path) -> None:
    build("sd1").save_pretrained(tmp_path / "base")
    images = pictures(tmp_path / "in", 1)
    scanned = CliRunner().invoke(cli, ["scan", str(tmp_path / "base")])
    assert scanned.exit_code == 0, scanned.output
    (base,) = json.loads(CliRunner().invoke(cli, ["ls", "--json"]).stdout)
    asked = [
        "lora",
        "--base",
        base["id"],
        "--data",
        str(images),
        "-o",
        str(tmp_path / "out"),
        "--name",
        "cats",
        "--steps",
        "1",
    ]
    small = [
        "--set",
        "data.resolution=64",
        "--set",
        "adapter.rank=2",
        "--set",
        "adapter.only=['*.up_blocks.2.*']",
        "--json",
    ]
    done = invoke(*asked, *small)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert Path(document["output"]).name == "cats.safetensors"
    listed = CliRunner().invoke(cli, ["ls", "--json"])
    assert {row["id"] for row in json.loads(listed.stdout)} == {base["id"], *document["library_ids"]}
    shown = json.loads(CliRunner().invoke(cli, ["show", document["library_ids"][0], "--json"]).stdout)
    assert [edge["op"] for edge in shown["lineage"]["parents"]] == ["train"]
    assert invoke(*asked, *small).exit_code == 1
    again = invoke("lora", "-c", str(tmp_path / "out" / "train.toml"), "--resume", "--json")
    assert json.loads(again.stdout)["resumed_from"] == 1


def test_the_command_prints_configuration_words_and_estimates(tmp_path: Path) -> None:
    printed = invoke("pivotal", "--token", "<cat>", "--set", "run.seed=9", "--print-config")
    assert from_mapping(tomllib.loads(printed.stdout)) == from_mapping(
        {"method": "pivotal", "tokens": {"names": ["<cat>"]}, "run": {"seed": 9}}
    )
    assert "norm_decay = 0.0  # pull of each step towards the norm" in invoke("lora", "--explain").stdout
    assert invoke("lora", "--set", "run.steps=none").exit_code == 2
    build("sd1").save_pretrained(tmp_path / "base")
    dry = invoke(
        "lora",
        "--base",
        str(tmp_path / "base"),
        "--data",
        str(pictures(tmp_path / "in")),
        "--set",
        "data.resolution=64",
        "--dry-run",
    )
    assert "activations" in dry.stdout
