"""Video, audio and world-model transformers, as their published configurations say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.model import Model

_WAN = "diffusers:WanTransformer3DModel"
_VACE = "diffusers:WanVACETransformer3DModel"
_SKYREELS = "diffusers:SkyReelsV2Transformer3DModel"
_HUNYUAN = "diffusers:HunyuanVideoTransformer3DModel"
_LTX = "diffusers:LTXVideoTransformer3DModel"
_LTX2 = "diffusers:LTX2VideoTransformer3DModel"
_CONNECTORS = "diffusers.pipelines.ltx2.connectors:LTX2TextConnectors"
_COGVIDEOX = "diffusers:CogVideoXTransformer3DModel"
_COSMOS = "diffusers:CosmosTransformer3DModel"
_KANDINSKY5 = "diffusers:Kandinsky5Transformer3DModel"

_WAN_1B: Mapping[str, Any] = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_WAN_5B: Mapping[str, Any] = {
    "in_channels": 48,
    "out_channels": 48,
    "num_attention_heads": 24,
    "ffn_dim": 14336,
    "num_layers": 30,
}
_WAN_IMAGE: Mapping[str, Any] = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
_SKYREELS_14B: Mapping[str, Any] = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
_FRAMEPACK: Mapping[str, Any] = {"has_image_proj": True, "has_clean_x_embedder": True}
_LTX_13B: Mapping[str, Any] = {"num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096}
_LTX23: Mapping[str, Any] = {
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}
_LTX25: Mapping[str, Any] = {**_LTX23, "ff_bias": False, "use_keyframes_abs_pos_embedding": True}
_LTX23_CONNECTORS: Mapping[str, Any] = {
    "video_connector_num_attention_heads": 32,
    "video_connector_num_layers": 8,
    "video_gated_attn": True,
    "audio_connector_num_attention_heads": 32,
    "audio_connector_attention_head_dim": 64,
    "audio_connector_num_layers": 8,
    "audio_gated_attn": True,
    "per_modality_projections": True,
    "proj_bias": True,
}
_COG_5B: Mapping[str, Any] = {
    "num_attention_heads": 48,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}
_COG_15: Mapping[str, Any] = {
    **_COG_5B,
    "patch_size_t": 2,
    "patch_bias": False,
    "sample_width": 300,
    "sample_height": 300,
    "sample_frames": 81,
}
_COSMOS_14B: Mapping[str, Any] = {"num_attention_heads": 40, "num_layers": 36}
_PREDICT2: Mapping[str, Any] = {"extra_pos_embed_type": None}
_PREDICT2_2B: Mapping[str, Any] = {**_PREDICT2, "num_attention_heads": 16}
_PREDICT2_14B: Mapping[str, Any] = {**_PREDICT2, **_COSMOS_14B}
_TO_WORLD: Mapping[str, Any] = {"in_channels": 17}
_PREDICT25: Mapping[str, Any] = {
    **_TO_WORLD,
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 100352,
}
_K5_LITE: Mapping[str, Any] = {
    "in_visual_dim": 16,
    "out_visual_dim": 16,
    "model_dim": 1792,
    "ff_dim": 7168,
    "visual_cond": True,
}
_K5_PRO: Mapping[str, Any] = {
    **_K5_LITE,
    "time_dim": 1024,
    "model_dim": 4096,
    "ff_dim": 16384,
    "num_text_blocks": 4,
    "num_visual_blocks": 60,
    "axes_dims": (32, 48, 48),
}

MODELS: Mapping[str, Model] = {
    "wan21-1.3b-t2v-transformer": Model(_WAN, _WAN_1B),
    "wan21-14b-t2v-transformer": Model(_WAN, note="also both experts of Wan 2.2 T2V-A14B"),
    "wan21-14b-i2v-transformer": Model(_WAN, _WAN_IMAGE, note="also ChronoEdit-14B"),
    "wan21-14b-flf2v-transformer": Model(_WAN, {**_WAN_IMAGE, "pos_embed_seq_len": 514}),
    "wan22-a14b-i2v-transformer": Model(_WAN, {"in_channels": 36}, note="both experts"),
    "wan22-5b-ti2v-transformer": Model(_WAN, _WAN_5B),
    "wan21-1.3b-vace-transformer": Model(_VACE, {**_WAN_1B, "vace_layers": tuple(range(0, 30, 2))}),
    "wan21-14b-vace-transformer": Model(_VACE),
    "wan22-14b-animate-transformer": Model(
        "diffusers:WanAnimateTransformer3DModel", {"added_kv_proj_dim": 5120}, note="hand-written"
    ),
    "wan-animate2-transformer": Model(
        "diffusers:WanAnimate2Transformer3DModel", note="class defaults; diffusers keeps Wan's native names here"
    ),
    "lucy-edit-transformer": Model(_WAN, {**_WAN_5B, "in_channels": 96}, note="hand-written"),
    "anyflow-14b-transformer": Model("diffusers:AnyFlowTransformer3DModel", note="class defaults"),
    "skyreels-v2-1.3b-transformer": Model(_SKYREELS, {**_WAN_1B, "inject_sample_info": True}),
    "skyreels-v2-14b-transformer": Model(_SKYREELS, _SKYREELS_14B),
    "skyreels-v2-14b-i2v-transformer": Model(_SKYREELS, {**_SKYREELS_14B, **_WAN_IMAGE}),
    "helios-transformer": Model("diffusers:HeliosTransformer3DModel", note="class defaults"),
    "hunyuan-video-transformer": Model(_HUNYUAN, note="also the 16-channel image-to-video release"),
    "hunyuan-video-i2v-transformer": Model(
        _HUNYUAN, {"in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat"}
    ),
    "hunyuan-video-skyreels-i2v-transformer": Model(_HUNYUAN, {"in_channels": 32}, note="hand-written"),
    "framepack-transformer": Model("diffusers:HunyuanVideoFramepackTransformer3DModel", _FRAMEPACK),
    "hunyuan-video-1.5-transformer": Model("diffusers:HunyuanVideo15Transformer3DModel"),
    "ltx-video-transformer": Model(_LTX, note="2B"),
    "ltx-video-13b-transformer": Model(_LTX, _LTX_13B),
    "ltx2-transformer": Model(_LTX2),
    "ltx2-connectors": Model(_CONNECTORS),
    "ltx23-transformer": Model(_LTX2, _LTX23),
    "ltx25-transformer": Model(_LTX2, _LTX25),
    "ltx23-connectors": Model(_CONNECTORS, _LTX23_CONNECTORS),
    "cogvideox-2b-transformer": Model(_COGVIDEOX),
    "cogvideox-5b-transformer": Model(_COGVIDEOX, _COG_5B),
    "cogvideox-5b-i2v-transformer": Model(
        _COGVIDEOX, {**_COG_5B, "in_channels": 32, "use_learned_positional_embeddings": True}
    ),
    "cogvideox15-5b-transformer": Model(_COGVIDEOX, _COG_15),
    "cogvideox15-5b-i2v-transformer": Model(_COGVIDEOX, {**_COG_15, "in_channels": 32, "ofs_embed_dim": 512}),
    "consisid-transformer": Model(
        "diffusers:ConsisIDTransformer3DModel",
        {**_COG_5B, "in_channels": 32, "use_learned_positional_embeddings": True, "is_train_face": True},
        note="hand-written",
    ),
    "mochi-transformer": Model("diffusers:MochiTransformer3DModel"),
    "kandinsky5-lite-video-transformer": Model(_KANDINSKY5, _K5_LITE, note="T2V and I2V"),
    "kandinsky5-pro-video-transformer": Model(_KANDINSKY5, _K5_PRO, note="T2V and I2V"),
    "sana-video-transformer": Model("diffusers:SanaVideoTransformer3DModel", note="class defaults"),
    "cosmos-predict1-7b-transformer": Model(_COSMOS),
    "cosmos-predict1-7b-v2w-transformer": Model(_COSMOS, _TO_WORLD),
    "cosmos-predict1-14b-transformer": Model(_COSMOS, _COSMOS_14B),
    "cosmos-predict1-14b-v2w-transformer": Model(_COSMOS, {**_COSMOS_14B, **_TO_WORLD}),
    "cosmos-predict2-2b-transformer": Model(_COSMOS, _PREDICT2_2B),
    "cosmos-predict2-2b-v2w-transformer": Model(_COSMOS, {**_PREDICT2_2B, **_TO_WORLD}),
    "cosmos-predict2-14b-transformer": Model(_COSMOS, _PREDICT2_14B),
    "cosmos-predict2-14b-v2w-transformer": Model(_COSMOS, {**_PREDICT2_14B, **_TO_WORLD}),
    "cosmos-predict25-2b-transformer": Model(_COSMOS, {**_PREDICT2_2B, **_PREDICT25}),
    "cosmos-predict25-14b-transformer": Model(_COSMOS, {**_PREDICT2_14B, **_PREDICT25}),
    "minimax-h3-transformer": Model("diffusers:MiniMaxH3Transformer3DModel", note="both partitions"),
    "ace-step-transformer": Model(
        "diffusers:AceStepTransformer1DModel", note="class defaults; 1.5 turbo, base and sft"
    ),
    "rfd4-proteina-transformer": Model(
        "diffusers.models.transformers.transformer_rfd4_proteina:RFD4ProteinaTransformer", note="class defaults"
    ),
}
