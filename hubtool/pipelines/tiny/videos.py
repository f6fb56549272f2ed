"""Tiny video and audio transformers, of the published depth."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hubtool.pipelines.tiny.recipe import Recipe, part

_HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}
_WAN = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 8, "ffn_dim": 32,
}  # fmt: skip
_HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "mlp_ratio": 2.0, "text_embed_dim": 12, "pooled_projection_dim": 10,
    "rope_axes_dim": (2, 2, 4), **_HEADS,
}  # fmt: skip
_LTX2_CONNECTORS = {
    "caption_channels": 12, "text_proj_in_factor": 2, "video_connector_num_attention_heads": 2, "video_connector_attention_head_dim": 6,
    "video_connector_num_learnable_registers": 4, "audio_connector_num_attention_heads": 2, "audio_connector_attention_head_dim": 6,
    "audio_connector_num_learnable_registers": 4, "connector_rope_base_seq_len": 16,
}  # fmt: skip


def _only(pipeline: str, model: str, **config: Any) -> Recipe:
    return Recipe(pipeline, {"transformer": part(model, **config)})


def _wan() -> Recipe:
    """Wan 2.2: one transformer for high noise, one for low."""
    return Recipe(
        "WanPipeline", {name: part("WanTransformer3DModel", **_WAN) for name in ("transformer", "transformer_2")}
    )


def _ltx2() -> Recipe:
    transformer = part(
        "LTX2VideoTransformer3DModel", in_channels=4, out_channels=4, cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4,
        audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8, caption_channels=12, **_HEADS,
    )  # fmt: skip
    connectors = part("pipelines.ltx2:LTX2TextConnectors", **_LTX2_CONNECTORS)
    return Recipe("LTX2Pipeline", {"transformer": transformer, "connectors": connectors})


def _cosmos() -> Recipe:
    transformer = part(
        "CosmosTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, text_embed_dim=10,
        adaln_lora_dim=4, max_size=(4, 8, 8),
    )  # fmt: skip
    # the class reads its VAE's statistics, and without a safety checker it would ask for NVIDIA's guardrail package: any module stands in
    vae = part(
        "AutoencoderKLWan", base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4, temperal_downsample=[False, True, True],
    )  # fmt: skip
    return Recipe("Cosmos2_5_PredictBasePipeline", {"transformer": transformer, "vae": vae, "safety_checker": _idle})


def _idle() -> Any:
    from torch import nn

    return nn.Identity()


RECIPES: Mapping[str, Recipe] = MappingProxyType({
    "wan": _wan(),
    "skyreels": _only("SkyReelsV2Pipeline", "SkyReelsV2Transformer3DModel", num_layers=40, **_WAN),
    "helios": _only("HeliosPipeline", "HeliosTransformer3DModel", rope_dim=(4, 4, 4), **_WAN),
    "hunyuan-video": _only("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", **_HUNYUAN),
    "hunyuan-video-1.5": _only(
        "HunyuanVideo15ModularPipeline", "HunyuanVideo15Transformer3DModel", in_channels=9, out_channels=4, mlp_ratio=2.0, text_embed_dim=12,
        text_embed_2_dim=10, image_embed_dim=6, rope_axes_dim=(2, 2, 4), **_HEADS,
    ),
    "framepack": _only(
        "HunyuanVideoFramepackPipeline", "HunyuanVideoFramepackTransformer3DModel", has_image_proj=True, image_proj_dim=14,
        has_clean_x_embedder=True, **_HUNYUAN,
    ),
    "ltx-video": _only("LTXPipeline", "LTXVideoTransformer3DModel", in_channels=4, out_channels=4, cross_attention_dim=16, caption_channels=12, **_HEADS),
    "ltx2": _ltx2(),
    "sana-video": _only(
        "SanaVideoPipeline", "SanaVideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=16, sample_size=8,
        rope_max_seq_len=16,
    ),
    "cogvideox": _only(
        "CogVideoXPipeline", "CogVideoXTransformer3DModel", in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=12, num_layers=42,
        sample_width=4, sample_height=4, sample_frames=5, max_text_seq_length=8, use_rotary_positional_embeddings=True, **_HEADS,
    ),
    "mochi": _only(
        "MochiPipeline", "MochiTransformer3DModel", pooled_projection_dim=8, in_channels=4, text_embed_dim=12, time_embed_dim=8,
        max_sequence_length=8, **_HEADS,
    ),
    "cosmos": _cosmos(),
    "kandinsky5": _only(
        "Kandinsky5T2VPipeline", "Kandinsky5Transformer3DModel", in_text_dim=12, in_text_dim2=8, time_dim=8, model_dim=16, ff_dim=32,
        axes_dims=(2, 2, 4),
    ),
    "minimax-h3": _only(
        "MiniMaxH3ModularPipeline", "MiniMaxH3Transformer3DModel", hidden_size=16, ffn_dim=32, in_channels=4, audio_in_channels=4,
        text_dim=12, freq_dim=8, time_embed_hidden_dim=16, time_embed_dim=8, rope_freq_dim=2, **_HEADS,
    ),
    "ace-step": _only(
        "AceStepPipeline", "AceStepTransformer1DModel", hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, in_channels=12, audio_acoustic_hidden_dim=4,
    ),
})  # fmt: skip
