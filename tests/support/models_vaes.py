"""Autoencoders, as their published configurations say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.model import Model

_KL = "diffusers:AutoencoderKL"
_SD: Mapping[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
_WAN22: Mapping[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "latents_mean": (0.0,) * 48,
    "latents_std": (1.0,) * 48,
}
_LTX_091: Mapping[str, Any] = {
    "decoder_block_out_channels": (256, 512, 1024),
    "decoder_layers_per_block": (5, 6, 7, 8),
    "decoder_spatio_temporal_scaling": (True, True, True),
    "decoder_inject_noise": (False, True, True, True),
    "upsample_residual": (True, True, True),
    "upsample_factor": (2, 2, 2),
    "timestep_conditioning": True,
}
_LTX23: Mapping[str, Any] = {
    "block_out_channels": (256, 512, 1024, 1024),
    "decoder_block_out_channels": (256, 512, 512, 1024),
    "layers_per_block": (4, 6, 4, 2, 2),
    "decoder_layers_per_block": (4, 6, 4, 2, 2),
    "decoder_spatio_temporal_scaling": (True, True, True, True),
    "decoder_inject_noise": (False, False, False, False, False),
    "upsample_type": ("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
    "upsample_residual": (False, False, False, False),
    "upsample_factor": (2, 2, 1, 2),
    "decoder_causal": False,
}
_DC: Mapping[str, Any] = {
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
}

MODELS: Mapping[str, Model] = {
    "sd-vae": Model(_KL, _SD, note="SD1, SD2, SDXL, Kolors, PixArt, AuraFlow"),
    "flux1-vae": Model(
        _KL,
        {**_SD, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
        note="SD3, Flux.1, Chroma, Lumina2, Z-Image, HiDream",
    ),
    "flux2-vae": Model("diffusers:AutoencoderKLFlux2", note="Flux.2, Ideogram4, ERNIE-Image"),
    "wan21-vae": Model("diffusers:AutoencoderKLWan", note="Wan 2.1 and 2.2 A14B, Cosmos-Predict2"),
    "wan22-vae": Model("diffusers:AutoencoderKLWan", _WAN22, note="Wan 2.2 5B, Bria FIBO"),
    "qwen-image-vae": Model("diffusers:AutoencoderKLQwenImage", note="Qwen-Image, Krea2, Anima"),
    "ltx-video-vae": Model("diffusers:AutoencoderKLLTXVideo", note="0.9.0"),
    "ltx-video-091-vae": Model("diffusers:AutoencoderKLLTXVideo", _LTX_091, note="0.9.1"),
    "ltx2-vae": Model("diffusers:AutoencoderKLLTX2Video"),
    "ltx23-vae": Model("diffusers:AutoencoderKLLTX2Video", _LTX23, note="2.3 and 2.5"),
    "hunyuan-video-vae": Model("diffusers:AutoencoderKLHunyuanVideo"),
    "hunyuan-video-1.5-vae": Model("diffusers:AutoencoderKLHunyuanVideo15"),
    "cogvideox-vae": Model("diffusers:AutoencoderKLCogVideoX"),
    "mochi-vae": Model("diffusers:AutoencoderKLMochi"),
    "sana-vae": Model("diffusers:AutoencoderDC", _DC, note="dc-ae-f32c32"),
}
