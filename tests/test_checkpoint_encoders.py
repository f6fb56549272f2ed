"""Text encoders in files of their own: into folders that transformers reads, into the names of single files, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hubtool.actions.convert import convert
from hubtool.errors import ConversionError, UnknownFamily
from hubtool.formats import open_file
from hubtool.ops.target import Target
from tests.support.files import write_safetensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def encoder(width: int, *, projected: bool = False) -> Any:
    """A CLIP of one layer with the width that tells which one it is."""
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=width // 64, vocab_size=64,
        projection_dim=width, hidden_act="gelu" if projected else "quick_gelu", bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config).eval()


def published(model: Any) -> dict[str, Any]:
    """The weights under the names of published files, whichever generation of transformers is installed."""
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("position_ids")}
    known = ("text_model.", "text_projection.")
    return {name if name.startswith(known) else "text_model." + name: tensor for name, tensor in own.items()}


def saved(path: Path, tensors: dict[str, Any]) -> Path:
    rows = {name: ("F32", tuple(t.shape), t.contiguous().numpy().tobytes()) for name, t in tensors.items()}
    write_safetensors(path, rows)
    return path


def content(path: Path) -> dict[str, bytes]:
    from hubtool.tensors.evaluate import to_bytes
    from hubtool.tensors.expr import Read

    return {name: to_bytes(Read(ref)) for name, ref in open_file(path).tensors.items()}


@pytest.mark.parametrize("prefix", ["text_model.", "", "transformer.text_model."])
def test_transformers_reads_the_folder_of_an_encoder(tmp_path: Path, prefix: str) -> None:
    model = encoder(768)
    tensors = {name.replace("text_model.", prefix, 1): tensor for name, tensor in published(model).items()}
    source = saved(tmp_path / "clip_l.safetensors", tensors)
    convert(source, tmp_path / "out", Target(layout="diffusers", family="sdxl"))
    read = transformers.CLIPTextModel.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[0, 5, 9, 2]])
    with torch.no_grad():
        assert torch.equal(read(ids).last_hidden_state, model(ids).last_hidden_state)
        assert torch.equal(read(ids).pooler_output, model(ids).pooler_output)


def test_an_encoder_takes_the_names_of_single_files_and_its_own_again(tmp_path: Path) -> None:
    source = saved(tmp_path / "clip_g.safetensors", published(encoder(1280, projected=True)))
    convert(source, tmp_path / "open.safetensors", Target(layout="single-file", family="sdxl"))
    names = set(content(tmp_path / "open.safetensors"))
    assert {"positional_embedding", "text_projection", "transformer.resblocks.0.attn.in_proj_weight"} <= names
    convert(tmp_path / "open.safetensors", tmp_path / "back", Target(layout="diffusers"))
    assert content(tmp_path / "back" / "model.safetensors") == content(source)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["hidden_act"] == "gelu"


def test_an_encoder_that_families_configure_differently_needs_a_word(tmp_path: Path) -> None:
    source = saved(tmp_path / "clip_l.safetensors", published(encoder(768)))
    with pytest.raises(UnknownFamily, match="sd1, sdxl, sd3, flux1"):
        convert(source, tmp_path / "out", Target(layout="diffusers"))


@pytest.mark.parametrize(("family", "told"), [("sd2", "of sd2"), (None, "that hubtool knows")])
def test_an_encoder_of_no_known_pipeline_is_refused_by_name(tmp_path: Path, family: str | None, told: str) -> None:
    keys = ("embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "layers.0.mlp.gate_proj.weight")
    source = saved(tmp_path / "gemma.safetensors", {f"model.{key}": torch.zeros(4, 4) for key in keys})
    with pytest.raises(ConversionError, match=rf"no pipeline {told} has this text encoder \(decoder\)"):
        convert(source, tmp_path / "out", Target(layout="diffusers", family=family))
