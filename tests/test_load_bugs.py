"""Files that diffusers 0.42.1 mis-scales, drops or refuses (spec: layouts 4.1 and 4.2), loaded through hubtool: what acts is the formula.

Each test writes the file as the tool in question does, loads it, and compares every live weight with scale * up @ down, by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from hubtool.actions.load import load
from tests.support import tiny

Delta = Callable[[torch.Tensor], torch.Tensor]  # fp64 change, given the fp64 weight
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
TE = "encoder.layers.3"


@dataclass
class Sheet:
    """A file in the making and what it means: ``deltas[component, live path]``."""

    pipe: Any
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    deltas: dict[tuple[str, str], Delta] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def factors(self, out: int, inside: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(len(self.tensors))
        return torch.randn(out, rank, generator=generator) * 0.2, torch.randn(rank, inside, generator=generator) * 0.2

    def add(
        self,
        component: str,
        path: str | tuple[str, ...],
        stem: str,
        rank: int = 4,
        alpha: float | None = None,
        words: tuple[str, str] = ("lora_up", "lora_down"),
        swapped: bool = False,
    ) -> None:
        """Low-rank factors of one module, or of a weight fused of several, spelled ``stem``."""
        paths = (path,) if isinstance(path, str) else path
        weights = [getattr(self.pipe, component).get_submodule(one).weight.flatten(1) for one in paths]
        up, down = self.factors(sum(len(one) for one in weights), weights[0].shape[1], rank)
        self.tensors |= {f"{stem}.{words[0]}.weight": up, f"{stem}.{words[1]}.weight": down}
        if alpha is not None:
            self.tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        change = (1.0 if alpha is None else alpha / rank) * (up.double() @ down.double())
        change = torch.cat(change.chunk(2)[::-1]) if swapped else change
        for one, part in zip(paths, change.split([len(w) for w in weights]), strict=True):
            self.deltas[component, one] = lambda _, part=part: part

    def check(self, path: Path, **how: Any) -> Any:
        """Save, load, compare."""
        safetensors.torch.save_file(self.tensors, path, self.metadata or None)
        before = tiny.weights(self.pipe)
        report = load(self.pipe, path, **how)
        after = tiny.effective(self.pipe)
        for component, state in before.items():
            for name, old in state.items():
                delta = self.deltas.get((component, name.removesuffix(".weight")))
                expected = old.double() if delta is None else old.double() + delta(old.double()).reshape(old.shape)
                torch.testing.assert_close(after[component][name].double(), expected, rtol=1e-5, atol=2e-6, msg=name)
        return report


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "adapter.safetensors"


def flat(prefix: str, path: str) -> str:
    return f"{prefix}_{path.replace('.', '_')}"


def sd1(alphas: Mapping[str, float | None], rank: int = 4, prefix: str = "lora_unet") -> Sheet:
    sheet = Sheet(tiny.build("sd1"))
    for leaf, alpha in alphas.items():
        sheet.add("unet", f"{BLOCK}.{leaf}", flat(prefix, f"{BLOCK}.{leaf}"), rank, alpha)
    return sheet


ATTENTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k")


def test_01_alphas_that_differ_between_modules_each_count(file: Path) -> None:
    sheet = sd1(dict(zip(ATTENTION, (4.0, 4.0, 4.0, 4.0, 1.0, 16.0), strict=True)))
    for leaf, alpha in (
        ("self_attn.q_proj", 2.0),
        ("self_attn.k_proj", 8.0),
        ("self_attn.out_proj", 4.0),
        ("mlp.fc1", 1.0),
    ):
        sheet.add("text_encoder", f"{TE}.{leaf}", flat("lora_te_text_model", f"{TE}.{leaf}"), 4, alpha)
    sheet.check(file)
    stock = tiny.build("sd1")
    with pytest.warns(RuntimeWarning, match="alpha_pattern keys did not match"):
        stock.load_lora_weights(file)
    scales = {leaf: stock.unet.get_submodule(f"{BLOCK}.{leaf}").scaling["default_0"] for leaf in ATTENTION}
    assert scales["attn2.to_q"] == 1.0  # diffusers: should be 0.25
    assert scales["attn2.to_k"] == 1.0  # and 4


def test_01_alpha_equal_to_a_rank_that_differs_is_a_scale_of_one_everywhere(file: Path) -> None:
    sheet = Sheet(tiny.build("sd1"))
    for rank, leaf in zip((2, 8, 4, 16), ATTENTION, strict=False):
        sheet.add("unet", f"{BLOCK}.{leaf}", flat("lora_unet", f"{BLOCK}.{leaf}"), rank, float(rank))
    sheet.check(file)


def test_02_an_alpha_that_is_missing_means_the_rank_and_not_the_others_alpha(file: Path) -> None:
    sd1({**dict.fromkeys(ATTENTION[:4], 1.0), "attn2.to_q": None, "ff.net.2": None}).check(file)


FLUX_TOP = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer_linear": "proj_out",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1", "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1", "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
}  # fmt: skip


def flux_top() -> Sheet:
    sheet = Sheet(tiny.build("flux1"))
    for outside, path in FLUX_TOP.items():
        sheet.add("transformer", path, f"lora_unet_{outside}", 4, 2.0)
    sheet.add("transformer", "norm_out.linear", "lora_unet_final_layer_adaLN_modulation_1", 4, 2.0, swapped=True)
    return sheet


def test_03_and_12_the_top_of_a_kohya_flux_file_counts_with_its_alphas(file: Path) -> None:
    flux_top().check(file)
    stock = tiny.build("flux1")
    stock.load_lora_weights(file)
    assert stock.get_list_adapters() == {}  # diffusers: no message, nothing loaded


def test_12_fused_blocks_beside_the_top_are_cut_at_the_live_modules(file: Path) -> None:
    sheet = flux_top()
    block, single = "transformer_blocks.7", "single_transformer_blocks.37"
    qkv = ("attn.to_q", "attn.to_k", "attn.to_v")
    added = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
    sheet.add("transformer", tuple(f"{block}.{leaf}" for leaf in qkv), "lora_unet_double_blocks_7_img_attn_qkv", 4, 1.0)
    sheet.add(
        "transformer", tuple(f"{block}.{leaf}" for leaf in added), "lora_unet_double_blocks_7_txt_attn_qkv", 2, 3.0
    )
    sheet.add(
        "transformer",
        tuple(f"{single}.{leaf}" for leaf in (*qkv, "proj_mlp")),
        "lora_unet_single_blocks_37_linear1",
        4,
        8.0,
    )
    sheet.add("text_encoder", f"{TE}.mlp.fc2", flat("lora_te1_text_model", f"{TE}.mlp.fc2"), 4, 1.0)
    assert not sheet.check(file).collapsed


def test_12_t5_factors_and_norms_of_a_flux_file_reach_their_modules(file: Path) -> None:
    sheet = Sheet(tiny.build("flux1"))
    sheet.add("transformer", "x_embedder", "lora_unet_img_in", 4, 2.0)
    sheet.add(
        "text_encoder_2",
        "encoder.block.5.layer.0.SelfAttention.q",
        "lora_te3_encoder_block_5_layer_0_SelfAttention_q",
        4,
        2.0,
    )
    norm = torch.full((8,), 0.25)
    sheet.tensors["lora_unet_double_blocks_7_img_attn_norm_query_norm.w_norm"] = norm
    sheet.deltas["transformer", "transformer_blocks.7.attn.norm_q"] = lambda _: norm.double()
    assert sheet.check(file).collapsed


ONETRAINER = {
    "attn.to_q": "attn_to_q", "ff.net.0.proj": "ff_net_0_proj", "ff.net.2": "ff_net_2", "norm1.linear": "norm1_linear",
    "ff_context.net.2": "ff_context_net_2",
}  # fmt: skip


def test_13_onetrainer_modules_outside_attention_do_not_collapse_onto_one_key(file: Path) -> None:
    sheet = Sheet(tiny.build("flux1"))
    for path, outside in ONETRAINER.items():
        sheet.add(
            "transformer", f"transformer_blocks.3.{path}", f"lora_transformer_transformer_blocks_3_{outside}", 4, 1.0
        )
    for path in ("proj_mlp", "proj_out", "norm.linear"):
        stem = flat("lora_transformer", f"single_transformer_blocks.5.{path}")
        sheet.add("transformer", f"single_transformer_blocks.5.{path}", stem, 4, 1.0)
    assert len(sheet.check(file).modules["transformer"]) == 8


@pytest.mark.parametrize("axis", ["out", "in"])
def test_14_a_dora_magnitude_directs_the_weight_on_either_axis(file: Path, axis: str) -> None:
    sheet, path = sd1({"attn1.to_q": 2.0}), f"{BLOCK}.attn1.to_q"
    dim, shape = (1, (16, 1)) if axis == "out" else (0, (1, 16))
    magnitude = torch.linspace(0.5, 1.5, 16).reshape(shape)
    sheet.tensors[f"{flat('lora_unet', path)}.dora_scale"] = magnitude
    plain = sheet.deltas["unet", path]

    def directed(w: torch.Tensor) -> torch.Tensor:
        moved = w + plain(w)
        return magnitude.double() * moved / moved.norm(dim=dim, keepdim=True) - w

    sheet.deltas["unet", path] = directed
    sheet.check(file, collapse=True)


def test_15_kinds_that_diffusers_calls_not_correctly_renamed(file: Path) -> None:
    sheet, path = Sheet(tiny.build("sdxl")), "mid_block.attentions.0.transformer_blocks.3.attn1.to_q"
    sheet.add("text_encoder_2", "text_projection", "lora_te2_text_projection", 4, 1.0)
    conv = "down_blocks.1.resnets.0.conv1"
    out, inside = sheet.pipe.unet.get_submodule(conv).weight.shape[:2]
    up, mid, down = torch.randn(out, 3, 1, 1) * 0.2, torch.randn(3, 3, 3, 3) * 0.2, torch.randn(3, inside, 1, 1) * 0.2
    sheet.tensors |= {
        f"{flat('lora_unet', conv)}.lora_{n}.weight": t for n, t in (("up", up), ("mid", mid), ("down", down))
    }
    u, d = up.double()[..., 0, 0], down.double()[..., 0, 0]
    sheet.deltas["unet", conv] = lambda _: torch.einsum("mnkl,im,nj->ijkl", mid.double(), u, d)
    (a1, b1), (a2, b2) = sheet.factors(64, 64, 3), sheet.factors(64, 64, 3)
    stem = flat("lora_unet", path)
    sheet.tensors |= {
        f"{stem}.hada_w1_a": a1,
        f"{stem}.hada_w1_b": b1,
        f"{stem}.hada_w2_a": a2,
        f"{stem}.hada_w2_b": b2,
    }
    sheet.deltas["unet", path] = lambda _: (a1.double() @ b1.double()) * (a2.double() @ b2.double())
    sheet.check(file)
    with pytest.raises(ValueError, match="not been correctly renamed"):
        tiny.build("sdxl").load_lora_weights(file)


def test_16_sgm_and_diffusers_names_in_one_file_both_count(file: Path) -> None:
    sheet = Sheet(tiny.build("sdxl"))
    sgm, plain = (f"down_blocks.1.attentions.{i}.transformer_blocks.0.attn1.to_q" for i in (0, 1))
    sheet.add("unet", sgm, "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", 4, 2.0)
    sheet.add("unet", plain, flat("lora_unet", plain), 4, 1.0)
    sheet.check(file)


def test_17_comfy_spelling_of_flux2_loads_and_its_last_modulation_is_swapped(file: Path) -> None:
    sheet = Sheet(tiny.build("flux2"))
    sheet.add("transformer", "x_embedder", "diffusion_model.img_in", 4, 2.0)
    sheet.add("transformer", "norm_out.linear", "diffusion_model.final_layer.adaLN_modulation.1", 4, 2.0, swapped=True)
    sheet.add(
        "transformer", "transformer_blocks.2.attn.to_out.0", "diffusion_model.double_blocks.2.img_attn.proj", 4, 1.0
    )
    sheet.check(file)


@pytest.mark.parametrize("leaves", [("q_proj", "v_proj"), ("q_proj", "v_proj", "fc1"), ("fc1", "fc2")], ids="+".join)
def test_18_a_text_encoder_with_some_of_its_projections_is_whole(file: Path, leaves: tuple[str, ...]) -> None:
    sheet = Sheet(tiny.build("sd1"))
    for leaf in leaves:
        path = f"{TE}.{'mlp' if leaf.startswith('fc') else 'self_attn'}.{leaf}"
        sheet.add("text_encoder", path, f"text_encoder.text_model.{path}", 4, None, ("lora_B", "lora_A"))
    assert not sheet.check(file).collapsed


def test_19_base_model_prefix_with_diffusers_names_is_no_other_tools_file(file: Path) -> None:
    sheet = Sheet(tiny.build("flux1"))
    for path in ("transformer_blocks.3.attn.to_q", "single_transformer_blocks.5.proj_mlp", "x_embedder"):
        sheet.add("transformer", path, f"base_model.model.{path}", 4, None, ("lora_B", "lora_A"))
    sheet.check(file)


def test_19_musubi_wan_with_gaps_between_its_blocks(file: Path) -> None:
    sheet = Sheet(tiny.build("wan"))
    for block in (0, 7, 39):
        sheet.add("transformer", f"blocks.{block}.attn1.to_q", f"lora_unet_blocks_{block}_self_attn_q", 4, 1.0)
    sheet.add("transformer", "blocks.7.ffn.net.2", "lora_unet_blocks_7_ffn_2", 4, 2.0)
    sheet.check(file)
