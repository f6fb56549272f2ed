"""What training says before it starts: missing packages, bases, estimates; and the command."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from hubtool.actions import train as actions
from hubtool.cli.main import cli
from hubtool.errors import HubError, HubtoolError, MissingExtra
from hubtool.pipelines import base_families
from hubtool.pipelines.tiny import build
from hubtool.training import bases, opening
from hubtool.training import config as configs
from hubtool.training.config import from_mapping
from hubtool.training.methods import METHODS
from tests.support.training import config, pictures


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
        base_families.families("some/where")


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
