"""The defects of other converters, each as a file that hubtool reads and writes right (numbers: spec/layouts.md 4.1 and 4.2)."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest

from hubtool.adapters.ir import Adapter
from hubtool.adapters.low_rank import LowRank
from hubtool.formats import open_file
from hubtool.layouts import emit, parse_file
from hubtool.layouts.content import content_id
from hubtool.layouts.vocabulary import model, weight_shape
from hubtool.tensors.evaluate import to_bytes
from tests.support.adapters import closed, make, scalar, values, write
from tests.support.files import write_safetensors

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def module(stem: str, out: int, inner: int, *, rank: int = 4, alpha: float | None = None, seed: int = 0, names: tuple[str, str] = ("lora_down.weight", "lora_up.weight")) -> Tensors:  # fmt: skip
    """The tensors of one low-rank module under a stem."""
    down, up = values((rank, inner), seed), values((out, rank), seed + 1)
    found = {f"{stem}.{names[0]}": ("F32", down.shape, down.data), f"{stem}.{names[1]}": ("F32", up.shape, up.data)}
    if alpha is not None:
        found[f"{stem}.alpha"] = ("F32", (), struct.pack("<f", alpha))
    return found


def read(folder: Path, tensors: Tensors, metadata: dict[str, str] | None = None, family: str | None = None) -> Adapter:
    path = folder / f"{len(list(folder.iterdir()))}.safetensors"
    write_safetensors(path, tensors, metadata)
    return parse_file(open_file(path), family).adapter


def low_rank(adapter: Adapter, path: str, component: str = "transformer") -> LowRank:
    patch = adapter.patches[component, path]
    assert isinstance(patch, LowRank)
    return patch


TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT_Q = "lora_unet_" + TO_Q.replace(".", "_")


def test_4_1_4_stacked_qkv_of_sd_scripts_has_the_scale_every_reader_gives_it(tmp_path: Path) -> None:
    """down = (3r, in) stacked, up block-sparse: alpha over the tensor's rank, not over a third of it."""
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    adapter = read(tmp_path, module(stem, 9216, 3072, rank=12, alpha=4.0), family="flux1")
    for part in ("to_q", "to_k", "to_v"):
        assert low_rank(adapter, f"transformer_blocks.0.attn.{part}").scale == 4 / 12


def test_4_1_6_a_missing_alpha_is_the_rank(tmp_path: Path) -> None:
    adapter = read(tmp_path, module(FLAT_Q, 320, 320, rank=8), family="sd1")
    assert low_rank(adapter, TO_Q, "unet").scale == 1.0
    assert FLAT_Q + ".alpha" not in emit(adapter, "kohya").tensors


def test_4_1_7_rank_stabilisation_survives_where_no_configuration_goes(tmp_path: Path) -> None:
    config = {"unet.r": 16, "unet.lora_alpha": 8, "unet.use_rslora": True}
    tensors = module("unet." + TO_Q, 320, 320, rank=16, names=("lora_A.weight", "lora_B.weight"))
    adapter = read(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(config)}, "sd1")
    assert low_rank(adapter, TO_Q, "unet").scale == 8 / math.sqrt(16)
    alpha = emit(adapter, "kohya").tensors[FLAT_Q + ".alpha"]
    assert struct.unpack("<f", to_bytes(alpha))[0] / 16 == 8 / math.sqrt(16)


def test_4_1_8_a_full_matrix_lokr_ignores_its_alpha(tmp_path: Path) -> None:
    w1, w2 = values((4, 4), 1), values((80, 80), 2)
    tensors: Tensors = {
        f"{FLAT_Q}.lokr_w1": ("F32", w1.shape, w1.data),
        f"{FLAT_Q}.lokr_w2": ("F32", w2.shape, w2.data),
        f"{FLAT_Q}.alpha": ("F32", (), struct.pack("<f", 9999999999.0)),
    }
    adapter = read(tmp_path, tensors, family="sd1")
    assert adapter.patches["unet", TO_Q].scale == 1.0


def test_4_1_9_a_folded_scale_never_underflows_in_half_precision() -> None:
    adapter = make("sd1", [("unet", TO_Q)], ranks=(4,), alphas=(0.003,), dtype="F16")
    up = emit(adapter, "diffusers-legacy").tensors[f"unet.{TO_Q}.lora.up.weight"]
    assert up.dtype == "F32"


def test_4_1_10_stale_ranks_in_the_metadata_do_not_count(tmp_path: Path) -> None:
    config = {"unet.r": 64, "unet.lora_alpha": 8, "unet.rank_pattern": {TO_Q: 32}}
    tensors = module("unet." + TO_Q, 320, 320, rank=4, names=("lora_A.weight", "lora_B.weight"))
    adapter = read(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(config)}, "sd1")
    assert low_rank(adapter, TO_Q, "unet").scale == 8 / 4
    written = json.loads(emit(adapter, "diffusers").metadata["lora_adapter_metadata"])
    assert written["unet.r"] == 4


def test_4_2_12_every_top_level_module_of_a_flux_file_arrives(tmp_path: Path) -> None:
    stems = {
        "img_in": (3072, 64, "x_embedder"),
        "txt_in": (3072, 4096, "context_embedder"),
        "time_in_in_layer": (3072, 256, "time_text_embed.timestep_embedder.linear_1"),
        "vector_in_out_layer": (3072, 3072, "time_text_embed.text_embedder.linear_2"),
        "guidance_in_in_layer": (3072, 256, "time_text_embed.guidance_embedder.linear_1"),
        "final_layer_linear": (64, 3072, "proj_out"),
    }
    tensors: Tensors = {}
    for i, (stem, (out, inner, _)) in enumerate(stems.items()):
        tensors |= module(f"lora_unet_{stem}", out, inner, alpha=2.0, seed=10 * i)
    adapter = read(tmp_path, tensors)
    assert adapter.family == "flux1"
    assert {path for _, path in adapter.patches} == {canonical for _, _, canonical in stems.values()}
    assert all(f"transformer.{path}.lora_A.weight" in emit(adapter, "diffusers").tensors for _, path in adapter.patches)


def test_4_2_13_the_modules_of_one_onetrainer_block_stay_apart(tmp_path: Path) -> None:
    names = ["norm.linear", "proj_mlp", "proj_out", "attn.to_q", "attn.to_k", "attn.to_v"]
    tensors: Tensors = {}
    for i, name in enumerate(names):
        out, inner = weight_shape("flux1", "transformer", f"single_transformer_blocks.0.{name}") or (0, 0)
        stem = f"lora_transformer_single_transformer_blocks_0_{name}".replace(".", "_")
        tensors |= module(stem, out, inner, alpha=1.0, seed=10 * i)
    adapter = read(tmp_path, tensors, family="flux1")
    assert {path for _, path in adapter.patches} == {f"single_transformer_blocks.0.{name}" for name in names}


def test_4_2_16_sgm_and_diffusers_names_in_one_file_are_both_read(tmp_path: Path) -> None:
    tensors = module("lora_unet_input_blocks_4_1_proj_in", 640, 640, alpha=4.0)
    tensors |= module("lora_unet_down_blocks_1_attentions_1_proj_in", 640, 640, alpha=4.0, seed=5)
    adapter = read(tmp_path, tensors, family="sdxl")
    assert {path for _, path in adapter.patches} == {
        "down_blocks.1.attentions.0.proj_in",
        "down_blocks.1.attentions.1.proj_in",
    }


def test_4_2_17_flux2_final_modulation_is_turned(tmp_path: Path) -> None:
    size = "flux2-dev-transformer"
    out, inner = model(size)["norm_out.linear"]["weight"]
    adapter = read(tmp_path, module("diffusion_model.final_layer.adaLN_modulation.1", out, inner), family="flux2")
    up, half = to_bytes(low_rank(adapter, "norm_out.linear").up), out * 4 * 4 // 2
    source = values((out, 4), 1).data
    assert up == source[half:] + source[:half]


@pytest.mark.parametrize("kept", [("q_proj", "v_proj"), ("q_proj", "v_proj", "mlp.fc1")])
def test_4_2_18_a_text_encoder_with_some_projections_keeps_them(tmp_path: Path, kept: tuple[str, ...]) -> None:
    layer = "text_model.encoder.layers.0."
    paths = [layer + ("" if name.startswith("mlp") else "self_attn.") + name for name in kept]
    adapter = make("sd1", [("text_encoder", path) for path in paths], ranks=(2,), alphas=(1.0,))
    again = parse_file(open_file(write(adapter, tmp_path / "a.safetensors", "kohya")), "sd1").adapter
    assert [path for _, path in again.patches] == paths


def test_4_2_19_diffusers_names_below_base_model_are_not_taken_for_the_original(tmp_path: Path) -> None:
    tensors = module(
        "base_model.model.transformer_blocks.0.attn.to_q", 3072, 3072, names=("lora_A.weight", "lora_B.weight")
    )
    adapter = read(tmp_path, tensors, family="flux1")
    assert set(adapter.patches) == {("transformer", "transformer_blocks.0.attn.to_q")}


def test_4_2_19_wan_blocks_need_not_be_contiguous(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for i, block in enumerate((3, 17, 39)):
        tensors |= module(f"lora_unet_blocks_{block}_self_attn_q", 5120, 5120, alpha=1.0, seed=i)
    adapter = read(tmp_path, tensors)
    assert adapter.family == "wan"
    assert {path for _, path in adapter.patches} == {f"blocks.{block}.attn1.to_q" for block in (3, 17, 39)}


def test_4_2_20_sd3_streams_are_not_exchanged(tmp_path: Path) -> None:
    tensors = module("lora_unet_joint_blocks_0_x_block_attn_qkv", 4608, 1536, alpha=1.0)
    tensors |= module("lora_unet_joint_blocks_0_context_block_attn_qkv", 4608, 1536, alpha=2.0, seed=7)
    adapter = read(tmp_path, tensors, family="sd3")
    assert low_rank(adapter, "transformer_blocks.0.attn.to_q").alpha_value == 1.0
    assert low_rank(adapter, "transformer_blocks.0.attn.add_q_proj").alpha_value == 2.0


def test_4_2_20_five_spellings_of_one_z_image_adapter_are_one_adapter(tmp_path: Path) -> None:
    parts = closed(
        "z-image", [("transformer", "layers.0.attention.to_q"), ("transformer", "layers.0.attention.to_out.0")]
    )
    adapter = make("z-image", parts, ranks=(4,))
    names = [
        "kohya/original",
        "kohya/diffusers",
        "wan-fun/diffusers",
        "comfy/original",
        "comfy/diffusers",
        "diffusers-legacy",
    ]
    files = [write(adapter, tmp_path / f"{i}.safetensors", name) for i, name in enumerate(names)]
    assert len({content_id(open_file(path)) for path in files}) == 1


def test_4_2_22_text_encoders_and_alphas_of_a_flux_file_come_back(tmp_path: Path) -> None:
    keys = closed(
        "flux1",
        [("transformer", "transformer_blocks.0.attn.to_q"), ("text_encoder", "text_model.encoder.layers.0.mlp.fc1")],
    )
    adapter = make("flux1", keys, ranks=(4,), alphas=(2.0, 3.0))
    there = parse_file(open_file(write(adapter, tmp_path / "a.safetensors", "diffusers")), "flux1").adapter
    back = parse_file(open_file(write(there, tmp_path / "b.safetensors", "kohya")), "flux1").adapter
    assert {key: patch.scale for key, patch in back.patches.items()} == {
        key: patch.scale for key, patch in adapter.patches.items()
    }


def test_4_2_24_modules_to_save_are_kept_or_named_as_a_loss(tmp_path: Path) -> None:
    tensors = module("lora_unet_" + TO_Q.replace(".", "_"), 320, 320, alpha=1.0)
    tensors["score.weight"] = ("F32", (2, 2), bytes(16))
    adapter = read(tmp_path, tensors, family="sd1")
    assert set(adapter.extras) == {"score.weight"}
    assert "score.weight" in emit(adapter, "kohya").tensors
    assert [loss.what for loss in emit(adapter, "diffusers").losses] == ["score.weight"]


def test_4_2_24_token_vectors_in_an_adapter_are_kept(tmp_path: Path) -> None:
    tensors = module(FLAT_Q, 320, 320, alpha=1.0)
    tensors["bundle_emb.tok.emb_params"] = ("F32", (2, 768), bytes(2 * 768 * 4))
    adapter = read(tmp_path, tensors, family="sd1")
    assert [item.token for item in adapter.embeddings] == ["tok"]
    assert "bundle_emb.tok.emb_params" in emit(adapter, "kohya").tensors
    assert emit(adapter, "diffusers").losses


def test_alpha_of_half_precision_keeps_its_dtype(tmp_path: Path) -> None:
    """Finding 35 of 4.4: bf16 alphas above 256 round; the tensor is data and travels as it is."""
    adapter = make("sd1", [("unet", TO_Q)], ranks=(4,), alphas=(3.0,), dtype="F16")
    assert low_rank(adapter, TO_Q, "unet").alpha == scalar(3.0, "F16")
    assert emit(adapter, "kohya").tensors[FLAT_Q + ".alpha"] == scalar(3.0, "F16")
