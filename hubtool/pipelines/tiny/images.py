"""Tiny image transformers of the published depth: whole pipelines of eight families, of the others what adapters are known to change."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hubtool.pipelines.tiny.encoders import clip, gemma2, qwen3, qwen25_vl, t5
from hubtool.pipelines.tiny.latents import dpm, flow, kl, qwen, shifted
from hubtool.pipelines.tiny.recipe import Recipe, part
from hubtool.pipelines.tiny.tokenizers import gemma_tokenizer, qwen_tokenizer, t5_tokenizer, tokenizer

_HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}
_ROPE = {"axes_dims_rope": (2, 2, 4)}
_FLUX2 = {"in_channels": 4, "joint_attention_dim": 12, "timestep_guidance_channels": 8, "axes_dims_rope": (2, 2, 2, 2)}


def _only(pipeline: str, model: str, **config: Any) -> Recipe:
    return Recipe(pipeline, {"transformer": part(model, **config)})


def _flux1() -> Recipe:
    transformer = part(
        "FluxTransformer2DModel", in_channels=4, joint_attention_dim=12, pooled_projection_dim=8, guidance_embeds=True, **_HEADS, **_ROPE,
    )  # fmt: skip
    first = {"text_encoder": clip(8, 12), "tokenizer": tokenizer}
    second = {"text_encoder_2": t5(12), "tokenizer_2": t5_tokenizer}
    more = {"vae": shifted(1), "scheduler": flow(shift=3.0, use_dynamic_shifting=True)}
    return Recipe("FluxPipeline", {"transformer": transformer, **first, **second, **more}, whole=True)


def _sd3() -> Recipe:
    transformer = part(
        "SD3Transformer2DModel", sample_size=8, in_channels=4, out_channels=4, num_layers=24, attention_head_dim=4,
        num_attention_heads=2, joint_attention_dim=20, caption_projection_dim=8, pooled_projection_dim=20, pos_embed_max_size=8,
    )  # fmt: skip
    first = {"text_encoder": clip(8, 12, projected=True), "tokenizer": tokenizer}
    second = {"text_encoder_2": clip(12, 32, projected=True), "tokenizer_2": tokenizer}
    third = {"text_encoder_3": t5(20), "tokenizer_3": t5_tokenizer}
    more = {"vae": shifted(4), "scheduler": flow(shift=3.0)}
    return Recipe(
        "StableDiffusion3Pipeline", {"transformer": transformer, **first, **second, **third, **more}, whole=True
    )


def _chroma() -> Recipe:
    transformer = part(
        "ChromaTransformer2DModel", in_channels=4, joint_attention_dim=12, approximator_num_channels=8,
        approximator_hidden_dim=24, **_HEADS, **_ROPE,
    )  # fmt: skip
    encoder = {"text_encoder": t5(12), "tokenizer": t5_tokenizer}
    more = {"vae": shifted(1), "scheduler": flow(shift=1.0)}
    return Recipe("ChromaPipeline", {"transformer": transformer, **encoder, **more}, whole=True)


def _lumina2() -> Recipe:
    transformer = part(
        "Lumina2Transformer2DModel", sample_size=8, in_channels=4, hidden_size=48, num_attention_heads=6, num_kv_heads=2,
        multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(512, 16, 16), cap_feat_dim=12,
    )  # fmt: skip
    encoder = {"text_encoder": gemma2(12), "tokenizer": gemma_tokenizer}
    more = {"vae": shifted(4), "scheduler": flow(shift=6.0)}
    return Recipe("Lumina2Pipeline", {"transformer": transformer, **encoder, **more}, whole=True)


def _z_image() -> Recipe:
    transformer = part(
        "ZImageTransformer2DModel", in_channels=4, dim=16, n_heads=2, n_kv_heads=2, cap_feat_dim=12, axes_dims=[2, 2, 4],
        axes_lens=[512, 16, 16],
    )  # fmt: skip
    encoder = {"text_encoder": qwen3(12), "tokenizer": qwen_tokenizer}
    more = {"vae": shifted(4), "scheduler": flow(shift=3.0)}
    return Recipe("ZImagePipeline", {"transformer": transformer, **encoder, **more}, whole=True)


def _qwen_image() -> Recipe:
    transformer = part(
        "QwenImageTransformer2DModel", in_channels=16, out_channels=4, joint_attention_dim=12, **_HEADS, **_ROPE,
    )  # fmt: skip
    encoder = {"text_encoder": qwen25_vl(12), "tokenizer": qwen_tokenizer}
    more = {
        "vae": qwen(4),
        "scheduler": flow(shift=1.0, shift_terminal=0.02, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9),
    }
    return Recipe("QwenImagePipeline", {"transformer": transformer, **encoder, **more}, whole=True)


def _pixart() -> Recipe:
    transformer = part(
        "PixArtTransformer2DModel", in_channels=4, out_channels=8, cross_attention_dim=16, sample_size=32, caption_channels=12,
        use_additional_conditions=False, **_HEADS,
    )  # fmt: skip
    encoder = {"text_encoder": t5(12), "tokenizer": t5_tokenizer}
    return Recipe(
        "PixArtSigmaPipeline", {"transformer": transformer, **encoder, "vae": kl(), "scheduler": dpm()}, whole=True
    )


def _auraflow() -> Recipe:
    transformer = part(
        "AuraFlowTransformer2DModel", sample_size=8, joint_attention_dim=12, caption_projection_dim=16, pos_embed_max_size=64, **_HEADS,
    )  # fmt: skip
    encoder = {"text_encoder": t5(12, each_biased=True), "tokenizer": t5_tokenizer}
    more = {"vae": kl(), "scheduler": flow(shift=1.73)}
    return Recipe("AuraFlowPipeline", {"transformer": transformer, **encoder, **more}, whole=True)


def _anima() -> Recipe:
    transformer = part(
        "CosmosTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12,
        text_embed_dim=8, adaln_lora_dim=4, max_size=(4, 8, 8), extra_pos_embed_type=None,
    )  # fmt: skip
    conditioner = part(
        "AnimaTextConditioner", source_dim=8, target_dim=8, model_dim=8, num_attention_heads=2, target_vocab_size=32
    )
    return Recipe("AnimaModularPipeline", {"transformer": transformer, "text_conditioner": conditioner})


RECIPES: Mapping[str, Recipe] = MappingProxyType({
    "sd3": _sd3(),
    "flux1": _flux1(),
    "chroma": _chroma(),
    "flux2": _only("Flux2Pipeline", "Flux2Transformer2DModel", **_FLUX2, **_HEADS),
    "flux3": _only(
        "Flux3ModularPipeline", "Flux3Transformer2DModel", in_channels=4, cond_in_channels=4, joint_attention_dim=12,
        timestep_channels=8, axes_dims_rope=(2, 2, 2, 2), **_HEADS,
    ),
    "qwen-image": _qwen_image(),
    "qwen-image-2.1": _only("QwenImage21ModularPipeline", "QwenImage21Transformer2DModel", in_channels=16, out_channels=16, context_in_dim=12, **_HEADS, **_ROPE),
    "z-image": _z_image(),
    "lumina2": _lumina2(),
    "sana": _only(
        "SanaPipeline", "SanaTransformer2DModel", in_channels=4, out_channels=4, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12, sample_size=8, **_HEADS,
    ),
    "pixart": _pixart(),
    "auraflow": _auraflow(),
    "cogview4": _only(
        "CogView4Pipeline", "CogView4Transformer2DModel", num_layers=28, in_channels=4, out_channels=4, text_embed_dim=12, time_embed_dim=8,
        condition_dim=4, pos_embed_max_size=8, sample_size=8, rope_axes_dim=(4, 4), **_HEADS,
    ),
    "hidream": _only(
        "HiDreamImagePipeline", "HiDreamImageTransformer2DModel", patch_size=2, in_channels=4, caption_channels=[12, 10], text_emb_dim=8,
        axes_dims_rope=(4, 2, 2), max_resolution=(8, 8), llama_layers=list(range(48)), **_HEADS,
    ),
    "hunyuan-image": _only(
        "HunyuanImagePipeline", "HunyuanImageTransformer2DModel", in_channels=4, out_channels=4, mlp_ratio=2.0, text_embed_dim=12,
        text_embed_2_dim=10, rope_axes_dim=(4, 4), **_HEADS,
    ),
    "krea2": _only(
        "Krea2Pipeline", "Krea2Transformer2DModel", in_channels=4, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=16, text_num_attention_heads=2, text_num_key_value_heads=2,
        text_intermediate_size=24, **_ROPE,
    ),
    "ideogram4": _only("Ideogram4Pipeline", "Ideogram4Transformer2DModel", in_channels=4, intermediate_size=32, adaln_dim=8, llm_features_dim=12, mrope_section=(2, 1, 1), **_HEADS),
    "anima": _anima(),
    "bria-fibo": _only("BriaFiboPipeline", "BriaFiboTransformer2DModel", in_channels=4, num_layers=8, joint_attention_dim=12, text_encoder_dim=6, **_HEADS, **_ROPE),
    "bria-fibo2": _only("BriaFibo2Pipeline", "BriaFibo2Transformer2DModel", in_channels=4, dim=32, n_heads=4, cap_feat_dim=12, axes_dims=(2, 2, 4), axes_lens=(16, 8, 8)),
    "ernie-image": _only(
        "ErnieImagePipeline", "ErnieImageTransformer2DModel", num_layers=36, hidden_size=16, num_attention_heads=2, ffn_hidden_size=32, in_channels=4,
        out_channels=4, text_in_dim=12, rope_axes_dim=(2, 2, 4),
    ),
    "amused": _only(
        "AmusedPipeline", "UVit2DModel", hidden_size=16, cond_embed_dim=8, micro_cond_encode_dim=4, micro_cond_embed_dim=20,
        encoder_hidden_size=12, vocab_size=20, codebook_size=16, in_channels=12, block_out_channels=12, block_num_heads=2,
        num_attention_heads=2, intermediate_size=32, sample_size=8,
    ),
})  # fmt: skip
