"""Image transformers, as their published configurations say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.model import Model

_FLUX = "diffusers:FluxTransformer2DModel"
_FLUX2 = "diffusers:Flux2Transformer2DModel"
_SD3 = "diffusers:SD3Transformer2DModel"
_SANA = "diffusers:SanaTransformer2DModel"
_PIXART = "diffusers:PixArtTransformer2DModel"
_QWEN = "diffusers:QwenImageTransformer2DModel"
_HUNYUAN = "diffusers:HunyuanImageTransformer2DModel"
_ZIMAGE = "diffusers:ZImageTransformer2DModel"
_COSMOS = "diffusers:CosmosTransformer3DModel"

_SD3_MEDIUM: Mapping[str, Any] = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
_SD35_MEDIUM: Mapping[str, Any] = {
    **_SD3_MEDIUM,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
_SD35_LARGE: Mapping[str, Any] = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
_FLUX1_DEV: Mapping[str, Any] = {"guidance_embeds": True}
_KLEIN_4B: Mapping[str, Any] = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
_KLEIN_9B: Mapping[str, Any] = {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
    "guidance_embeds": False,
}
_HIDREAM: Mapping[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "caption_channels": (4096, 4096),
    "axes_dims_rope": (64, 32, 32),
    "llama_layers": (*range(32), *([31] * 16)),
}
_SANA_06B: Mapping[str, Any] = {
    "num_attention_heads": 36,
    "num_layers": 28,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
_SANA_15: Mapping[str, Any] = {"qk_norm": "rms_norm_across_heads"}
_SANA_SPRINT: Mapping[str, Any] = {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True}
_PIXART_XL: Mapping[str, Any] = {"caption_channels": 4096, "sample_size": 128}
_HUNYUAN_21: Mapping[str, Any] = {"text_embed_2_dim": 1472}
_COGVIEW4: Mapping[str, Any] = {"num_layers": 28, "attention_head_dim": 128, "num_attention_heads": 32}
_ERNIE: Mapping[str, Any] = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_layers": 36,
    "ffn_hidden_size": 12288,
    "text_in_dim": 3072,
}
_K5_IMAGE: Mapping[str, Any] = {
    "in_visual_dim": 16,
    "out_visual_dim": 16,
    "model_dim": 2560,
    "ff_dim": 10240,
    "num_visual_blocks": 50,
    "axes_dims": (32, 48, 48),
}
_PREDICT2_2B: Mapping[str, Any] = {"num_attention_heads": 16, "extra_pos_embed_type": None}

MODELS: Mapping[str, Model] = {
    "sd3-medium-transformer": Model(_SD3, _SD3_MEDIUM),
    "sd35-medium-transformer": Model(_SD3, _SD35_MEDIUM),
    "sd35-large-transformer": Model(_SD3, _SD35_LARGE),
    "flux1-transformer": Model(_FLUX, _FLUX1_DEV, note="dev, Krea and Kontext"),
    "flux1-schnell-transformer": Model(_FLUX),
    "flux1-fill-transformer": Model(_FLUX, {**_FLUX1_DEV, "in_channels": 384, "out_channels": 64}),
    "flux1-control-transformer": Model(_FLUX, {**_FLUX1_DEV, "in_channels": 128, "out_channels": 64}),
    "chroma-transformer": Model("diffusers:ChromaTransformer2DModel"),
    "flux2-dev-transformer": Model(_FLUX2),
    "flux2-klein-4b-transformer": Model(_FLUX2, _KLEIN_4B),
    "flux2-klein-9b-transformer": Model(_FLUX2, _KLEIN_9B),
    "flux3-transformer": Model("diffusers:Flux3Transformer2DModel", note="class defaults"),
    "auraflow-transformer": Model(
        "diffusers:AuraFlowTransformer2DModel", note="class defaults (0.1); later releases have more positions"
    ),
    "hidream-transformer": Model("diffusers:HiDreamImageTransformer2DModel", _HIDREAM),
    "lumina2-transformer": Model("diffusers:Lumina2Transformer2DModel", {"cap_feat_dim": 2304}),
    "z-image-transformer": Model(_ZIMAGE),
    "z-image-omni-transformer": Model(_ZIMAGE, {"siglip_feat_dim": 1152}, note="hand-written"),
    "qwen-image-transformer": Model(_QWEN, note="edit models: the same modules"),
    "qwen-image-layered-transformer": Model(_QWEN, {"use_additional_t_cond": True}, note="hand-written"),
    "qwen-image-21-transformer": Model("diffusers:QwenImage21Transformer2DModel", note="class defaults"),
    "hunyuan-image-transformer": Model(_HUNYUAN, _HUNYUAN_21, note="2.1"),
    "hunyuan-image-distilled-transformer": Model(
        _HUNYUAN, {**_HUNYUAN_21, "guidance_embeds": True, "use_meanflow": True}
    ),
    "krea2-transformer": Model("diffusers:Krea2Transformer2DModel"),
    "ideogram4-transformer": Model("diffusers:Ideogram4Transformer2DModel"),
    "anima-transformer": Model(_COSMOS, _PREDICT2_2B, note="the modules of Cosmos-Predict2-2B-Text2Image"),
    "anima-text-conditioner": Model("diffusers:AnimaTextConditioner"),
    "sana-1.6b-transformer": Model(_SANA),
    "sana-0.6b-transformer": Model(_SANA, _SANA_06B),
    "sana15-1.6b-transformer": Model(_SANA, _SANA_15),
    "sana15-4.8b-transformer": Model(_SANA, {**_SANA_15, "num_layers": 60}),
    "sana-sprint-1.6b-transformer": Model(_SANA, _SANA_SPRINT),
    "sana-sprint-0.6b-transformer": Model(_SANA, {**_SANA_06B, **_SANA_SPRINT}),
    "pixart-alpha-transformer": Model(_PIXART, {**_PIXART_XL, "use_additional_conditions": True}),
    "pixart-sigma-transformer": Model(_PIXART, {**_PIXART_XL, "use_additional_conditions": False}),
    "cogview4-transformer": Model("diffusers:CogView4Transformer2DModel", _COGVIEW4),
    "kandinsky5-lite-t2i-transformer": Model("diffusers:Kandinsky5Transformer3DModel", _K5_IMAGE),
    "kandinsky5-lite-i2i-transformer": Model(
        "diffusers:Kandinsky5Transformer3DModel", {**_K5_IMAGE, "visual_cond": True}, note="hand-written"
    ),
    "bria-fibo-transformer": Model(
        "diffusers:BriaFiboTransformer2DModel", {"in_channels": 48, "num_layers": 8}, note="hand-written"
    ),
    "bria-fibo2-transformer": Model("diffusers:BriaFibo2Transformer2DModel", note="class defaults"),
    "ernie-image-transformer": Model("diffusers:ErnieImageTransformer2DModel", _ERNIE),
}
