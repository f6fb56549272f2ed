"""What kind of file is it? Recognisers, sentinel tables, unwrapping and the claims that metadata makes."""

from __future__ import annotations

import re
import struct
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hubtool.errors import CorruptFile
from hubtool.formats import open_file
from hubtool.formats.base import TensorFile
from hubtool.layouts import kinds
from hubtool.layouts.identify import identify, recognisers
from hubtool.layouts.kinds import _tables
from hubtool.layouts.kinds._values import floats, kurtosis
from hubtool.layouts.unwrap import unwrap, unwrapped
from hubtool.resources import schemas
from tests.support.tensor_files import base_lists, flat, pickled, signature, tensor

FAMILY_OF_BASE = {
    "sd15": "sd1", "sd15-inpaint": "sd1", "sd15-pix2pix": "sd1", "sd21": "sd2", "sdxl": "sdxl", "sdxl-refiner": "sdxl-refiner",
    "sd3-medium": "sd3", "sd35-medium": "sd3", "sd35-large": "sd3", "flux-dev": "flux1", "flux-schnell": "flux1",
    "flux2-dev": "flux2", "flux2-klein-4b": "flux2", "flux2-klein-9b": "flux2", "pixart-sigma": "pixart", "sana-1.6b": "sana",
    "cogvideox-5b": "cogvideox", "stable-cascade-prior": "cascade", "wan21-1.3b-t2v": "wan", "wan21-14b-i2v": "wan",
    "wan21-14b-t2v": "wan", "wan22-5b-ti2v": "wan",
}  # fmt: skip
KIND_OF_PART = {"unet": "checkpoint", "transformer": "checkpoint", "vae": "vae"}
P = "model.diffusion_model."
SD1_UNET = {
    f"{P}input_blocks.0.0.weight": (320, 4, 3, 3),
    f"{P}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    f"{P}out.2.weight": (4, 320, 3, 3),
}


def codes(file: TensorFile) -> set[str]:
    return {finding.code for finding in identify(file).findings}


# --- checkpoints -------------------------------------------------------------------------------------------------------------


def test_every_list_of_every_base_model_is_recognised_with_its_family(shared: Path) -> None:
    wrong = []
    for base, naming, part, keys in base_lists(shared / "bases"):
        if part == "extra":  # scheduler buffers
            continue
        found = identify(flat(keys))
        family, kind = FAMILY_OF_BASE.get(base, base), KIND_OF_PART.get(part, "text_encoder")
        if found.kind != kind or family not in (found.family, *_related(found.family_candidates)):
            wrong.append((base, naming, part, found.kind, found.family, found.family_candidates))
    assert wrong == []


def _related(candidates: tuple[str, ...]) -> tuple[str, ...]:
    """The refiner shares SDXL's VAE and large text encoder."""
    return (*candidates, "sdxl-refiner") if "sdxl" in candidates else candidates


def test_a_whole_single_file_checkpoint_counts_its_components(shared: Path) -> None:
    parts = {
        part: keys
        for base, naming, part, keys in base_lists(shared / "bases")
        if (base, naming) == ("sdxl", "original")
    }
    found = identify(flat({key: shape for keys in parts.values() for key, shape in keys.items()}))
    assert (found.family, found.layout, found.findings) == ("sdxl", "sgm", ())
    assert found.components == {"unet": 1680, "vae": 248, "text_encoder": 197, "text_encoder_2": 390}


def test_a_checkpoint_with_missing_tensors_is_reported_as_incomplete(shared: Path) -> None:
    [keys] = [
        keys
        for base, naming, part, keys in base_lists(shared / "bases")
        if (base, naming, part) == ("sd15", "original", "unet")
    ]
    file = flat(dict(list(keys.items())[:-40]))
    assert [finding.message for finding in identify(file).findings] == ["unet has 646 of at least 686 tensors"]


@pytest.mark.parametrize(
    ("channels", "variant"), [(4, None), (9, "inpaint"), (8, "instruct-pix2pix")], ids=["plain", "inpaint", "instruct"]
)
def test_input_channels_name_the_variant(channels: int, variant: str | None) -> None:
    found = identify(flat({**SD1_UNET, f"{P}input_blocks.0.0.weight": (320, channels, 3, 3)}))
    assert (found.family, found.variant) == ("sd1", variant)


def test_an_ema_copy_and_fp8_weights_are_flags() -> None:
    keys = {**SD1_UNET, **{f"model_ema.diffusion_modelx{i}": (4,) for i in range(120)}}
    found = identify(flat(keys, dtype="F8_E4M3"))
    assert set(found.flags) == {"ema", "fp8"}
    assert found.components == {"unet": 3}


def test_v_prediction_is_seen_in_keys_and_in_the_last_norm() -> None:
    width = {f"{P}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024)}
    plain = flat({**SD1_UNET, **width})
    name = f"{P}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    spread = tensor(name, 320, inline=struct.pack("<320f", *([0.5, -0.5] * 160)))
    assert "v-prediction" in identify(flat({**SD1_UNET, "v_pred": (0,)})).flags
    assert identify(plain).flags == ()
    assert "v-prediction" in identify(replace(plain, tensors={**plain.tensors, name: spread})).flags


def test_position_ids_that_are_fractions_are_reported() -> None:
    name = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    file = flat(SD1_UNET)
    ids = tensor(name, 1, 4, inline=struct.pack("<4f", 0, 1, 2.0004, 3))
    assert "broken-position-ids" in codes(replace(file, tensors={**file.tensors, name: ids}))


def test_an_unknown_u_net_keeps_its_architecture_and_names_candidates() -> None:
    keys = {
        "conv_in.weight": (32, 4, 3, 3),
        "time_embedding.linear_1.weight": (64, 32),
        "conv_out.weight": (4, 32, 3, 3),
    }
    found = identify(flat(keys))
    assert (found.kind, found.family, found.family_candidates) == ("checkpoint", None, ("sd1", "sd2"))


def test_a_bare_u_net_is_no_controlnet() -> None:
    """InvokeAI takes any key that starts with ``input_blocks`` for a ControlNet."""
    assert identify(flat({key.removeprefix(P): shape for key, shape in SD1_UNET.items()})).kind == "checkpoint"


def test_checkpoint_keys_and_adapter_keys_in_one_file_are_a_warning() -> None:
    found = identify(flat({**SD1_UNET, "lora_unet_x.lora_down.weight": (4, 4)}))
    assert found.kind == "checkpoint"
    assert "mixed-checkpoint" in {finding.code for finding in found.findings}


# --- other components --------------------------------------------------------------------------------------------------------

SIGNATURES = {
    "EasyNegative": ("textual_inversion", "sd1", "kohya"),
    "RealESRGAN_x2plus": ("upscaler", None, "esrgan"),
    "SwinIR-L_x4": ("upscaler", None, "swin"),
    "clip-vit-large-patch14": ("text_encoder", None, "clip"),
    "controlnet_canny_diffusers": ("controlnet", "sd1", "diffusers"),
    "ip_adapter_plus_face_sd15": ("ip_adapter", "sd1", "plus"),
    "ip_adapter_sd15": ("ip_adapter", "sd1", "base"),
    "ip_adapter_sd1_image_encoder": ("image_encoder", None, "clip-vision"),
    "sdxl_text_encoder": ("text_encoder", None, "clip-l"),
    "sdxl_text_encoder_2": ("text_encoder", None, "clip-g"),
    "sdxl_unet_diffusers_fp16": ("checkpoint", "sdxl", None),
    "sdxl_vae_diffusers_fp16": ("vae", None, "autoencoder-kl"),
    "siglip-so400m": ("text_encoder", None, "clip"),
    "text_encoder": ("text_encoder", None, "clip-l"),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_of_real_models_are_recognised(shared: Path, name: str) -> None:
    found = identify(signature(shared / "real" / "signature" / f"invoke-ai__{name}.json"))
    assert (found.kind, found.family, found.variant) == SIGNATURES[name]


MADE: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "taesd decoder": ({"1.weight": (64, 4, 3, 3), "3.conv.0.weight": (64, 64, 3, 3)}, "vae", None),
    "wan vae": (
        {
            "encoder.conv1.weight": (96, 3, 3, 3, 3),
            "decoder.conv1.weight": (384, 16, 3, 3, 3),
            "conv2.weight": (16, 16, 1, 1, 1),
        },
        "vae",
        None,
    ),
    "ldm controlnet": (
        {
            "control_model.zero_convs.0.0.weight": (320, 320, 1, 1),
            "control_model.input_hint_block.0.weight": (16, 3, 3, 3),
            "control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        },
        "controlnet",
        "sd2",
    ),
    "control-lora": ({"lora_controlnet": (0,), "input_blocks.0.0.up": (320, 4)}, "controlnet", None),
    "lllite": ({"lllite_unet_input_blocks_4_1_attn1_to_q.down.0.weight": (32, 640)}, "controlnet", None),
    "t2i light": (
        {"body.0.in_conv.weight": (4, 192, 1, 1), "body.0.body.0.block1.weight": (4, 4, 3, 3)},
        "t2i_adapter",
        None,
    ),
    "t2i xl": (
        {"adapter.conv_in.weight": (320, 768, 3, 3), "adapter.body.0.resnets.0.block1.weight": (320,)},
        "t2i_adapter",
        "sdxl",
    ),
    "ip faceid": (
        {
            "image_proj.proj.0.weight": (1, 512),
            "image_proj.norm.weight": (768,),
            "ip_adapter.1.to_k_ip.weight": (320, 2048),
        },
        "ip_adapter",
        "sdxl",
    ),
    "t5": (
        {"encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096), "shared.weight": (32128, 4096)},
        "text_encoder",
        None,
    ),
    "open clip g": (
        {
            "conditioner.embedders.1.model.token_embedding.weight": (49408, 1280),
            "conditioner.embedders.1.model.positional_embedding": (77, 1280),
            "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (3840, 1280),
        },
        "text_encoder",
        None,
    ),
    "compact upscaler": (
        {"body.0.weight": (64, 3, 3, 3), "body.1.weight": (64,), "body.2.weight": (64, 64, 3, 3)},
        "upscaler",
        None,
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_components_are_told_by_their_sentinels(name: str) -> None:
    keys, kind, family = MADE[name]
    found = identify(flat(keys))
    assert (found.kind, found.family) == (kind, family)
    assert found.evidence or name == "lllite"


def test_a_vae_config_tells_sdxl_from_sd1() -> None:
    keys = {"decoder.conv_in.weight": (512, 4, 3, 3), "decoder.up_blocks.0.resnets.0.conv1.weight": (512, 512, 3, 3)}
    file = flat(keys)
    assert identify(file).family_candidates == ("sd1", "sd2", "sdxl")
    assert identify(replace(file, config={"config.json": {"scaling_factor": 0.13025}})).family == "sdxl"


def test_a_pipeline_folder_is_one_artifact() -> None:
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    file = replace(flat({"unet/conv_in.weight": (32, 4, 3, 3)}), config={"model_index.json": index})
    found = identify(file)
    assert (found.kind, found.family, found.family_candidates) == ("diffusers_pipeline", None, ("sd1", "sd2"))
    assert [finding.code for finding in found.findings] == ["missing-component"]
    sized = replace(file, config={"model_index.json": index, "unet/config.json": {"cross_attention_dim": 1024}})
    assert identify(sized).family == "sd2"


def test_a_pipeline_of_a_known_denoiser_names_family_components_variant_and_what_is_missing() -> None:
    """Tensors come as ``component/key``, which no sentinel looks for by itself."""
    keys = {
        f"unet/{key}": shape
        for key, shape in {
            "conv_in.weight": (320, 9, 3, 3),
            "conv_out.weight": (4, 320, 3, 3),
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        }.items()
    }
    index = {
        "_class_name": "StableDiffusionInpaintPipeline",
        "scheduler": ["diffusers", "PNDMScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    found = identify(replace(flat(keys), format="diffusers-folder", config={"model_index.json": index}))
    assert (found.family, found.components, found.flags) == ("sd2", {"unet": 3}, ("inpaint",))
    assert [finding.message for finding in found.findings] == [
        "model_index.json names text_encoder, its weights are not here",
        "unet has 3 of at least 686 tensors",
    ]
    assert found.evidence[0].startswith("unet/down_blocks.0")


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"_class_name": "AutoencoderKLHunyuanVideo"}, "vae"),
        ({"_class_name": "FluxTransformer2DModel"}, "checkpoint"),
        ({"_class_name": "SD3ControlNetModel"}, "controlnet"),
        ({"architectures": ["CLIPVisionModelWithProjection"]}, "image_encoder"),
        ({"architectures": ["T5EncoderModel"]}, "text_encoder"),
        ({"_class_name": "SomethingElse"}, "unknown"),
        ({"architectures": [3]}, "unknown"),
    ],
)
def test_a_component_folder_of_unknown_tensors_is_what_its_configuration_says(config: Any, kind: str) -> None:
    file = replace(flat({"a.b": (2, 2)}), format="component-folder", config={"config.json": config})
    assert identify(file).kind == kind


def test_every_kind_is_in_the_closed_list() -> None:
    """DESIGN 5, and two kinds that ``layouts.kinds`` documents."""
    source = (module.read_text() for module in Path(kinds.__file__).parent.glob("*.py"))
    named = {name for text in source for name in re.findall(r"""(?:kind=|Identity\(\s*)"(\w+)\"""", text)}
    tables = {kind for kind in tomllib.loads((schemas() / "components.toml").read_text()) if kind != "by_width"}
    assert named | tables <= set(kinds.KINDS)
    assert set(kinds.KINDS) <= named | tables | {"diffusers_pipeline"}


# --- the other training methods ------------------------------------------------------------------------------------------------


def test_a_hypernetwork_is_told_by_integer_keys_and_its_context_width() -> None:
    net = {"linear.0.weight": (1536, 768), "linear.0.bias": (1536,), "linear.3.weight": (768, 1536)}
    found = identify(pickled({768: [net, net], "layer_structure": [1, 2, 1], "activation_func": "relu", "step": 5}))
    assert (found.kind, found.family, found.variant) == ("hypernetwork", "sd1", "a1111")
    assert "activation_func = relu" in found.evidence


def test_old_and_flat_hypernetworks_are_recognised_too() -> None:
    old = {"linear1.weight": (640, 320), "linear2.weight": (320, 640)}
    assert identify(pickled({320: [old, old]})).variant == "novelai"
    flat_form = flat({"hn.1024.k.linear.0.weight": (2048, 1024), "hn.1024.v.linear.0.weight": (2048, 1024)})
    assert (identify(flat_form).family, identify(flat_form).variant) == ("sd2", "flat")


def test_a_hypernetwork_whose_width_lies_is_a_warning() -> None:
    assert "shape-contradicts" in codes(flat({"hn.768.k.linear.0.weight": (1536, 700)}))


WEIGHT = (320, 768)
DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
CUSTOM: dict[str, tuple[Callable[[], TensorFile], list[str]]] = {
    "diffusers": (lambda: flat({f"{DOWN}.processor.to_k_custom_diffusion.weight": WEIGHT}), []),
    "compvis": (
        lambda: pickled(
            {"state_dict": {f"{P}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": WEIGHT, "embed": (1, 768)}}
        ),
        ["<new1>"],
    ),
    "cmu": (
        lambda: pickled({"unet": {f"{DOWN}.to_k.weight": WEIGHT}, "modifier_token": {"<new1>": (768,)}}),
        ["<new1>"],
    ),
    "cmu-sdxl": (
        lambda: pickled({"unet": {f"{DOWN}.to_k.weight": (640, 2048)}, "modifier_token": {"<v>": [(768,), (1280,)]}}),
        ["<v>", "<v>"],
    ),
    "compressed": (lambda: pickled({"unet": {f"{DOWN}.to_k.weight": {"u": (320, 4), "v": (4, 768)}}}), []),
}


@pytest.mark.parametrize("variant", CUSTOM)
def test_the_five_shapes_of_custom_diffusion(variant: str) -> None:
    make, tokens = CUSTOM[variant]
    found = identify(make())
    assert (found.kind, found.variant) == ("custom_diffusion", variant)
    assert found.family == ("sdxl" if variant == "cmu-sdxl" else "sd1")
    assert [item.token for item in found.embeddings] == tokens


@pytest.mark.parametrize("tree", [(50, 1, 77, 768), [(1, 77, 768)] * 50], ids=["stacked", "list"])
def test_null_text_embeddings_say_what_else_they_need(tree: Any) -> None:
    found = identify(pickled(tree))
    assert (found.kind, found.family, found.variant) == ("null_text", "sd1", "50-steps")
    assert [finding.code for finding in found.findings] == ["companion"]


def test_one_prompt_tensor_is_a_conditioning() -> None:
    assert identify(pickled((1, 77, 1024))).kind == "conditioning"


# --- values tell an aesthetic embedding from a token vector ----------------------------------------------------------------------


def bare_vector(values: list[float]) -> TensorFile:
    return pickled(tensor("(root)", 1, len(values), inline=struct.pack(f"<{len(values)}f", *values)))


def test_a_vector_with_one_huge_component_is_an_aesthetic_embedding() -> None:
    values = [0.1 * (-1) ** i for i in range(768)]
    values[644] = 20.0
    found = identify(bare_vector(values))
    assert (found.kind, found.family, found.kind_candidates) == ("aesthetic_embedding", "sd1", ())


def test_an_even_vector_is_a_textual_inversion() -> None:
    found = identify(bare_vector([0.01 * ((i * 37) % 100 - 50) for i in range(768)]))
    assert (found.kind, found.kind_candidates) == ("textual_inversion", ())


def test_a_vector_between_the_two_names_both() -> None:
    values = [0.01 * ((i * 37) % 100 - 50) for i in range(768)]
    values[644] = 3.2
    found = identify(bare_vector(values))
    assert 4.5 < kurtosis(values) < 30
    assert found.kind_candidates == ("aesthetic_embedding", "textual_inversion")
    assert [finding.code for finding in found.findings] == ["companion", "thin-evidence"]
    assert {finding.severity for finding in found.findings} == {"info"}


def test_half_precision_values_are_read_without_numpy() -> None:
    numbers = (0.5, -2.0, 1.0)
    assert floats(tensor("x", 3, dtype="F16", inline=struct.pack("<3e", *numbers))) == numbers
    bf16 = b"".join(struct.pack("<f", number)[2:] for number in numbers)
    assert floats(tensor("x", 3, dtype="BF16", inline=bf16)) == numbers
    assert floats(tensor("x", 1 << 20)) is None


# --- unknown ---------------------------------------------------------------------------------------------------------------------


def test_an_unknown_file_is_healthy_and_shows_its_keys() -> None:
    found = identify(flat({"a.b": (3, 3)}))
    assert found.kind == "unknown"
    assert [(finding.code, finding.severity) for finding in found.findings] == [("unrecognised", "info")]
    assert "a.b" in found.findings[0].message


def test_a_file_without_tensors_is_unknown() -> None:
    assert identify(flat({})).kind == "unknown"


def test_the_head_of_an_aesthetic_predictor_is_no_embedding() -> None:
    assert identify(pickled({"linear.weight": (1, 768), "linear.bias": (1,)})).kind == "unknown"


# --- unwrapping ------------------------------------------------------------------------------------------------------------------


def test_wrappers_are_taken_off_and_what_was_dropped_is_told() -> None:
    file = pickled({"state_dict": {"w": (2, 2)}, "optimizer_states": [{"m": (2, 2)}], "epoch": 3})
    tensors, findings = unwrapped(file)
    assert list(tensors) == ["w"]
    assert [finding.code for finding in findings] == ["unwrapped", "dropped-parts"]
    assert "optimizer_states" in findings[1].message


def test_the_ema_copy_of_an_upscaler_is_preferred() -> None:
    tensors, _ = unwrapped(pickled({"params": {"w": (1,)}, "params_ema": {"w": (2,)}}))
    assert tensors["w"].shape == (2,)


def test_a_module_that_is_called_model_is_no_wrapper() -> None:
    file = pickled({"model": {"w": (1,)}, "head": {"w": (1,)}})
    assert unwrapped(file)[0] == file.tensors


def test_unwrapping_twice_changes_nothing() -> None:
    once, _ = unwrap(pickled({"state_dict": {"state_dict": {"w": (2, 2)}}}))
    assert unwrap(once) == (once, ())


# --- tables and the list of kinds ------------------------------------------------------------------------------------------------


def test_recognisers_end_with_the_one_that_takes_everything() -> None:
    names = [recognise.__module__.rpartition(".")[2] for recognise in recognisers()]
    assert names[-1] == "unknown"
    assert {"checkpoint", "textual_inversion", "vae", "hypernetwork"} <= set(names)
    assert not any(name.startswith("_") for name in names)


def test_every_row_of_the_tables_compiles_and_names_a_family_once() -> None:
    rows = (*_tables.checkpoints().rows, *_tables.checkpoints().variants)
    for kind in tomllib.loads((schemas() / "components.toml").read_text()):
        if kind != "by_width":
            rows += _tables.components(kind)
    assert all(row.have or row.start for row in rows)
    assert not any(row.family and row.candidates for row in rows)


# --- real and hostile files -------------------------------------------------------------------------------------------------------

REAL = {
    "ti/fastai__learned_embeds.bin": ("textual_inversion", None),
    "ti/huggingface__flora_SD21.pt": ("textual_inversion", "sd2"),
    "ti/Marcus-Arcadius__anya.pt": ("textual_inversion", "sd1"),
    "ti/Birch-san__embeddings_mps.pt": ("textual_inversion", "sd1"),
    "ti/oss-roettger__XL_myPuppet768.pt": ("textual_inversion", "sdxl"),
    "ti/HK200202-hub__embeddings.pti": ("textual_inversion", "sdxl"),
    "aesthetic/vicgalle__aivazovsky.pt": ("aesthetic_embedding", "sd1"),
    "aesthetic/vicgalle__sac_8plus.pt": ("aesthetic_embedding", "sd1"),
    "conditioning/huggingface__object_cat.pt": ("conditioning", "sd1"),
    "vae/huggingface__tiny_vae_diffusion_pytorch_model.bin": ("vae", None),
    "vae/madebyollin__taef2_decoder.pth": ("vae", None),
    "vae/vladmandic__VAE-approx_model.pt": ("vae", None),
    "text_encoder/huggingface__tiny_clip_pytorch_model.bin": ("text_encoder", None),
    "other/huggingface__sac_vit_l_14_linear.pth": ("unknown", None),
    "container/Elendil-Q__last.ckpt": ("unknown", None),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_what_they_are(shared: Path, name: str) -> None:
    found = identify(open_file(shared / "real" / name))
    assert (found.kind, found.family) == REAL[name]


def test_an_embedding_of_an_impossible_width_is_corrupt() -> None:
    with pytest.raises(CorruptFile, match="123"):
        identify(flat({"emb_params": (1, 123)}, dtype="F32"))
