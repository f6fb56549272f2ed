"""Opening a base: its family is told first, single files need nothing but the tables and a tokenizer, errors name the next command."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from hubtool.cli.main import cli
from hubtool.errors import CorruptFile, FileMissing, HubError, LoadMismatch, Unsupported, UsageProblem
from hubtool.layouts import checkpoint_tables, tables
from hubtool.pipelines import base_families, generating, opening, single_file
from hubtool.pipelines.generating import Request
from hubtool.pipelines.tiny import build
from hubtool.training import opening as of_training
from tests.support import checkpoints, narrow, training

REQUEST = Request("a cat", seeds=(1,), steps=2, width=64, height=64)
COMMIT = "a" * 40


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("narrow")


@cache
def folder(room: Path, family: str) -> Path:
    """A narrow pipeline as a folder."""
    narrow.make(family).save_pretrained(room / family)
    return room / family


def single(room: Path, family: str, layout: str = "single-file", drop: str = "-") -> Path:
    """The same as another program would write it into one file, without what ``drop`` names."""
    path = room / f"{family}-{layout}-{drop.strip('.')}.safetensors"
    if path.exists():
        return path
    made = path.with_suffix(".made.safetensors")
    checkpoints.convert(folder(room, family), made, layout, family=family)
    save_file({key: value for key, value in load_file(made).items() if drop not in key}, path, {"format": "pt"})
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def cached(hub: Path, repository: str, parts: dict[str, Path]) -> None:
    """Put folders into the cache as the Hub's client lays them down; the name "" is the repository itself."""
    home = hub / f"models--{repository.replace('/', '--')}"
    for name, source in parts.items():
        shutil.copytree(source, home / "snapshots" / COMMIT / name, dirs_exist_ok=True)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(COMMIT)


def tokenizers(base: Path) -> dict[str, Path]:
    return {path.name: path for path in base.glob("tokenizer*")}


def repository(family: str, number: int = 0) -> str:
    table = checkpoint_tables.pipeline(family)
    assert table is not None
    return table.repositories[number]


def picture(pipe: Any) -> Any:
    return numpy.asarray(next(generating.pictures(pipe, REQUEST))[1]).astype(int)


def opened(base: Any, **how: Any) -> Any:
    return opening.opened(base, torch.float32, **how)


@pytest.mark.parametrize("family", narrow.MAKERS)
def test_a_single_file_opens_offline_with_a_tokenizer_of_the_cache_as_its_folder(
    family: str, room: Path, hub: Path
) -> None:
    cached(hub, repository(family), tokenizers(folder(room, family)))
    pipe = opened(single(room, family, "original" if family == "flux1" else "single-file"))
    plain = narrow.make(family)
    assert type(pipe) is type(plain)
    assert (picture(pipe) == picture(plain)).all()
    assert type(pipe.scheduler) is type(plain.scheduler)


def test_a_transformer_alone_takes_the_rest_from_the_cache(room: Path, hub: Path) -> None:
    base = folder(room, "flux1")
    parts = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "vae")
    cached(hub, repository("flux1", 1), {name: base / name for name in parts})
    file = single(room, "flux1", "bfl")
    assert not any("text_encoders" in key for key in load_file(file))
    assert (picture(opened(file)) == picture(narrow.make("flux1"))).all()


def test_any_repository_that_has_the_tokenizer_will_do(room: Path, hub: Path) -> None:
    cached(hub, "openai/clip-vit-large-patch14", {"": folder(room, "sd1") / "tokenizer"})
    assert (picture(opened(single(room, "sd1"))) == picture(narrow.make("sd1"))).all()


def test_without_tokenizer_and_network_the_next_command_is_named(room: Path, hub: Path) -> None:
    file = single(room, "sd1")
    with pytest.raises(HubError, match="this file has no tokenizer, and the Hub does not give it") as caught:
        opened(file)
    assert "--config-from FOLDER" in str(caught.value.hint)
    assert "hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --include 'tokenizer/*'" in str(caught.value.hint)
    done = CliRunner().invoke(
        cli, ["generate", str(file), "-p", "a", "-o", str(hub.parent / "out.png"), "--device", "cpu"]
    )
    assert done.exit_code == 6
    assert "hint: --config-from FOLDER" in done.stderr


def test_a_download_that_was_cut_short_is_not_taken_for_the_part(room: Path, hub: Path) -> None:
    cached(hub, repository("sd1"), tokenizers(folder(room, "sd1")))
    (next(hub.glob("*/snapshots/*")) / "vae").mkdir()
    with pytest.raises(HubError, match="this file has no vae"):
        opened(single(room, "sd1", drop="first_stage_model."))


def test_what_is_missing_is_fetched_alone(room: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def fetch(name: str, *, local_files_only: bool = False, **how: Any) -> str:
        if local_files_only:
            raise OSError("nothing is here")
        asked.append((name, how["allow_patterns"]))
        return str(folder(room, "sd1"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    opened(single(room, "sd1"))
    assert asked == [(repository("sd1"), ["tokenizer/*"])]


def test_an_inpainting_file_becomes_an_inpainting_pipeline(tmp_path: Path, hub: Path) -> None:
    base = tmp_path / "base"
    narrow.inpainting().save_pretrained(base)
    made, file = tmp_path / "made.safetensors", tmp_path / "inpaint.safetensors"
    checkpoints.convert(base, made, "single-file", family="sd1")
    save_file(load_file(made), file, {"format": "pt"})
    narrow.make("sd1").save_pretrained(tmp_path / "plain")
    cached(hub, repository("sd1"), tokenizers(base))
    for configured in ("", str(base), str(tmp_path / "plain")):
        pipe = of_training.opened(str(file), ["sd1"], "lora", torch.float32, configured)
        assert type(pipe).__name__ == "StableDiffusionInpaintPipeline"
        assert pipe.unet.config.in_channels == 9
    with pytest.raises(Unsupported, match="needs one and a mask"):
        picture(pipe)


def test_sd3_with_the_encoders_of_clip_alone_goes_without_t5(room: Path, hub: Path) -> None:
    cached(hub, repository("sd3"), tokenizers(folder(room, "sd3")))
    pipe, plain = opened(single(room, "sd3", drop="t5xxl")), narrow.make("sd3")
    plain.text_encoder_3 = plain.tokenizer_3 = None
    assert (picture(pipe) == picture(plain)).all()


def test_a_projection_that_a_file_leaves_out_is_the_identity(room: Path, hub: Path) -> None:
    cached(hub, repository("sd3"), tokenizers(folder(room, "sd3")))
    pipe = opened(single(room, "sd3", drop="clip_l.transformer.text_projection"))
    assert torch.equal(pipe.text_encoder.text_projection.weight, torch.eye(24))


def test_families_whose_text_encoders_no_table_configures_ask_for_a_folder(tmp_path: Path, hub: Path) -> None:
    file = checkpoints.single("z-image", tmp_path)
    with pytest.raises(Unsupported, match="a single file of z-image has no text_encoder, tokenizer") as caught:
        opened(file)
    assert "--config-from" in str(caught.value.hint)
    pipe = opened(file, config_from=tmp_path / "z-image")
    assert abs(picture(pipe) - picture(build("z-image"))).max() <= 1


def test_configurations_of_another_family_are_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, file = checkpoints.saved("sdxl", tmp_path), checkpoints.single("sd1", tmp_path)
    monkeypatch.setattr(single_file, "compute", lambda tensor: pytest.fail("a weight was read"))
    with pytest.raises(LoadMismatch, match="configurations of sdxl do not fit a checkpoint of sd1"):
        opened(file, config_from=other)


def test_a_folder_that_is_damaged_is_told(tmp_path: Path) -> None:
    base = checkpoints.saved("sd1", tmp_path)
    (base / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CorruptFile, match="cannot open this base"):
        opened(base)


def test_what_is_no_base_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileMissing, match="no such base"):
        base_families.families(tmp_path / "nothing")
    with pytest.raises(UsageProblem, match="no base is named"):
        of_training.check("", ["sd1"], "lora")
    save_file(
        {"lora_unet_x.lora_down.weight": torch.zeros(2, 2), "lora_unet_x.lora_up.weight": torch.zeros(2, 2)},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(Unsupported, match="is no base"):
        base_families.families(tmp_path / "a.safetensors")


def test_a_base_that_a_method_does_not_fit_is_refused_before_it_is_opened(room: Path) -> None:
    for base in (folder(room, "sd1"), single(room, "sd1")):
        with pytest.raises(LoadMismatch, match="lora does not fit sd1"):
            of_training.opened(str(base), ["sdxl"], "lora", torch.float32)


@pytest.mark.parametrize(
    "document",
    [{"_class_name": "a\0b"}, {"_class_name": 7}, {}, {"_class_name": "StableDiffusionXLPipeline", "unet": 3}],
)
def test_an_index_of_nonsense_is_of_no_family_or_of_its_class(document: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(document))
    assert base_families.of_index(tmp_path) in (None, "sdxl")


def test_a_run_on_a_single_file_takes_its_configurations_from_a_folder(tmp_path: Path) -> None:
    file, base = checkpoints.single("sd1", tmp_path), tmp_path / "sd1"
    images = training.pictures(tmp_path / "images", 1)
    words = [
        "train",
        "lora",
        "--base",
        file,
        "--config-from",
        base,
        "--data",
        images,
        "-o",
        tmp_path / "out",
        "--steps",
        1,
    ]
    words += ["--set", "data.resolution=64", "--set", "adapter.rank=1", "--set", "adapter.only=['*.up_blocks.2.*']"]
    done = CliRunner().invoke(cli, [*map(str, words), "--set", "run.device=cpu", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["config"]["config_from"] == str(base)
    assert f'config_from = "{base}"' in (tmp_path / "out" / "train.toml").read_text()


@pytest.mark.parametrize("family", checkpoint_tables.families())
def test_what_a_file_lacks_is_looked_for_in_the_familys_own_repository_first(family: str) -> None:
    table = checkpoint_tables.pipeline(family)
    assert table is not None
    if table.repositories:
        assert table.repositories[0] == tables.family(family).base_model
        assert table.alone.keys() <= {name for name, words in table.others.items() if words}
