"""Folders and sharded files are opened as the one artifact they are; an index is checked against its shards."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from hubtool.errors import CorruptFile, HubtoolError, UnsafeFile, UnsupportedFile
from hubtool.formats import open_file
from hubtool.tensors.evaluate import scalars, to_bytes
from hubtool.tensors.expr import Read
from tests.support.files import floats, scalar, write_json, write_safetensors

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def sharded(folder: Path, index: str = INDEX, **changes: Any) -> Path:
    write_safetensors(folder / SHARDS[0], {"a": floats(4), "b": floats(2)}, {"format": "pt"})
    write_safetensors(folder / SHARDS[1], {"c": scalar(3.0)})
    where = {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]}
    return write_json(folder / index, {"metadata": {"total_size": 28}, "weight_map": where, **changes})


def test_shards_are_one_file(tmp_path: Path) -> None:
    file = open_file(sharded(tmp_path))
    assert file.format == "sharded"
    assert list(file.tensors) == ["a", "b", "c"]
    assert scalars(file.tensors["c"]) == (3.0,)
    assert [path.name for path in file.files] == [*SHARDS, INDEX]
    assert file.size == sum(path.stat().st_size for path in file.files[:2])
    assert (file.metadata, file.findings) == ({"format": "pt"}, ())


def test_a_wrong_total_is_a_warning(tmp_path: Path) -> None:
    assert [f.code for f in open_file(sharded(tmp_path, metadata={"total_size": 27})).findings] == ["total-size"]
    assert not open_file(sharded(tmp_path, metadata={})).findings


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ({"a": "../x.safetensors"}, UnsafeFile),
        ({"a": "/etc/x.safetensors"}, UnsafeFile),
        ({"a": "C:\\x.safetensors"}, UnsafeFile),
        ({"a": "pytorch_model.bin"}, UnsafeFile),
        ({"a": ".."}, UnsafeFile),
        ({"a": "x\u0000.safetensors"}, UnsafeFile),
        ({"a": "missing.safetensors"}, CorruptFile),
        ({"a": SHARDS[0], "b": SHARDS[0]}, CorruptFile),
        ({"a": SHARDS[0]}, CorruptFile),
        ({"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[0]}, CorruptFile),
        ({"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1], "d": SHARDS[1]}, CorruptFile),
        ({"a": 1}, CorruptFile),
        ({}, CorruptFile),
        ([], CorruptFile),
    ],
)
def test_a_map_that_leads_elsewhere_or_disagrees_is_refused(
    tmp_path: Path, where: Any, error: type[HubtoolError]
) -> None:
    path = sharded(tmp_path, weight_map=where)
    if where == {"a": SHARDS[0], "b": SHARDS[0]}:
        write_safetensors(tmp_path / SHARDS[0], {"a": floats(4)})
    with pytest.raises(error):
        open_file(path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    write_safetensors(tmp_path / SHARDS[1], {"c": scalar(3.0), "a": floats(4)})
    with pytest.raises(CorruptFile, match="two shards"):
        open_file(path)


def test_a_pickle_under_a_safetensors_name_is_no_shard(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = sharded(tmp_path)
    torch.save({"c": torch.tensor(3.0)}, tmp_path / SHARDS[1])
    with pytest.raises(UnsafeFile):
        open_file(path)


def test_an_index_that_is_no_plain_json_is_refused(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    for text in ("{", '{"weight_map": {"a": "x", "a": "y"}}', "[" * 100_000, "[]"):
        path.write_text(text)
        with pytest.raises((CorruptFile, UnsafeFile)):
            open_file(path)
    with path.open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(UnsafeFile, match="limit"):
        open_file(path)


def test_a_peft_folder_has_weights_and_config(tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA", "lora_alpha": float("inf")})
    weights = write_safetensors(
        tmp_path / "adapter_model.safetensors", {"base_model.model.x.lora_A.weight": floats(2, 2)}
    )
    file = open_file(tmp_path)
    assert (file.format, file.path) == ("peft-folder", tmp_path)
    assert list(file.tensors) == ["base_model.model.x.lora_A.weight"]
    assert file.config["adapter_config.json"]["peft_type"] == "LORA"
    assert file.files == (weights, tmp_path / "adapter_config.json")


def test_a_peft_folder_may_hold_a_torch_file(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    write_json(tmp_path / "adapter_config.json", {})
    torch.save({"x": torch.tensor([1.5, 2.5])}, tmp_path / "adapter_model.bin")
    assert scalars(open_file(tmp_path).tensors["x"]) == (1.5, 2.5)


def pipeline(folder: Path) -> Path:
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "safety_checker": [None, None],
            "vae": ["diffusers", "AutoencoderKL"],
            "requires_safety_checker": False,
        },
    )
    write_json(folder / "unet" / "config.json", {"cross_attention_dim": 768})
    write_safetensors(folder / "unet" / "diffusion_pytorch_model.safetensors", {"conv_in.weight": floats(2, 2)})
    write_safetensors(folder / "text_encoder" / "model.fp16.safetensors", {"x": floats(2)})
    write_json(folder / "scheduler" / "scheduler_config.json", {"a": 1})
    write_safetensors(folder / "safety_checker" / "model.safetensors", {"n": floats(2)})
    return folder


def test_a_pipeline_names_its_tensors_by_component(tmp_path: Path) -> None:
    file = open_file(pipeline(tmp_path))
    assert file.format == "diffusers-folder"
    assert list(file.tensors) == ["unet/conv_in.weight", "text_encoder/x"]
    assert file.tensors["unet/conv_in.weight"].name == "unet/conv_in.weight"
    assert to_bytes(Read(file.tensors["unet/conv_in.weight"])) == floats(2, 2)[2]
    assert set(file.config) == {"model_index.json", "unet/config.json", "scheduler/scheduler_config.json"}
    assert all(path.is_file() for path in file.files)


def test_a_component_name_that_is_a_path_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "model_index.json", {"../unet": ["diffusers", "UNet2DConditionModel"]})
    with pytest.raises(CorruptFile):
        open_file(tmp_path)


@pytest.mark.parametrize("index", [INDEX, "model.safetensors.index.fp16.json"])
def test_a_component_may_be_sharded(tmp_path: Path, index: str) -> None:
    write_json(tmp_path / "config.json", {"x": 1})
    sharded(tmp_path, index)
    file = open_file(tmp_path)
    assert file.format == "component-folder"
    assert list(file.tensors) == ["a", "b", "c"]
    assert file.config["config.json"] == {"x": 1}


def test_the_plain_variant_is_opened_and_the_others_are_told(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    for name in ("fp16.safetensors", "safetensors", "non_ema.safetensors"):
        write_safetensors(tmp_path / f"diffusion_pytorch_model.{name}", {name: floats(1)})
    file = open_file(tmp_path)
    assert list(file.tensors) == ["safetensors"]
    assert [(finding.code, finding.severity) for finding in file.findings] == [("variants", "info")]
    assert "fp16" in file.findings[0].message


@pytest.mark.parametrize("stem", ["pytorch_lora_weights", "learned_embeds", "pytorch_custom_diffusion_weights"])
def test_the_output_of_a_training_script_is_its_file(tmp_path: Path, stem: str) -> None:
    path = write_safetensors(tmp_path / f"{stem}.safetensors", {"x": floats(1)})
    file = open_file(tmp_path)
    assert (file.path, file.format, file.findings) == (path, "safetensors", ())


def test_a_lora_beside_its_embeddings_comes_first(tmp_path: Path) -> None:
    for stem in ("pytorch_lora_weights", "learned_embeds"):
        write_safetensors(tmp_path / f"{stem}.safetensors", {"x": floats(1)})
    file = open_file(tmp_path)
    assert file.path.stem == "pytorch_lora_weights"
    assert "learned_embeds" in file.findings[0].message


def test_any_other_folder_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "some.safetensors", {"x": floats(1)})
    with pytest.raises(UnsupportedFile, match=r"model_index\.json.*adapter_config\.json.*learned_embeds"):
        open_file(tmp_path)


def test_a_broken_document_is_corrupt(tmp_path: Path) -> None:
    pipeline(tmp_path)
    (tmp_path / "unet" / "config.json").write_text("not json")
    with pytest.raises(CorruptFile) as error:
        open_file(tmp_path)
    assert error.value.path == os.fspath(tmp_path / "unet" / "config.json")


def test_a_document_that_is_a_pipe_does_not_hang(tmp_path: Path) -> None:
    pipeline(tmp_path)
    (tmp_path / "model_index.json").unlink()
    os.mkfifo(tmp_path / "model_index.json")
    with pytest.raises(UnsupportedFile):
        open_file(tmp_path)


def test_real_folders_and_components(shared: Path, tmp_path: Path) -> None:
    real = shared / "real"
    for folder in (real / "peft").iterdir():
        assert open_file(folder).format == "peft-folder"
    copies = {
        "text_encoder/huggingface__tiny_clip_pytorch_model.bin": "text_encoder/pytorch_model.bin",
        "vae/huggingface__tiny_vae_diffusion_pytorch_model.bin": "vae/diffusion_pytorch_model.bin",
    }
    for source, target in copies.items():
        (tmp_path / target).parent.mkdir()
        shutil.copy(real / source, tmp_path / target)
    shutil.copy(real / "text_encoder" / "huggingface__tiny_model_index.json", tmp_path / "model_index.json")
    file = open_file(tmp_path)
    assert {name.split("/")[0] for name in file.tensors} == {"text_encoder", "vae"}
