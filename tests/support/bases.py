"""The base models behind the vocabularies, built on the meta device by the libraries that own them: no weights, no network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SD = {
    "sample_size": 64,
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
}
_XL = {
    "layers_per_block": 2,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
}
UNETS: Mapping[str, dict[str, Any]] = {
    "sd1": {**_SD, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {**_SD, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "sdxl": {
        **_XL,
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "projection_class_embeddings_input_dim": 2816,
    },
    "sdxl-refiner": {
        **_XL,
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (384, 768, 1536, 1536),
        "cross_attention_dim": 1280,
        "attention_head_dim": (6, 12, 24, 24),
        "transformer_layers_per_block": 4,
        "projection_class_embeddings_input_dim": 2560,
    },
}


def unet(family: str) -> Any:
    """The family's UNet on the meta device: names and shapes, no memory."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**UNETS[family])
