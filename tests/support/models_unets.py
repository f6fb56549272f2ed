"""UNets and the Stable Cascade stages, as their published configurations say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.model import Model

_CLASS = "diffusers:UNet2DConditionModel"
_CASCADE = "diffusers:StableCascadeUNet"
_SD: Mapping[str, Any] = {
    "sample_size": 64,
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
}
_SD1: Mapping[str, Any] = {**_SD, "cross_attention_dim": 768, "attention_head_dim": 8}
_SD2: Mapping[str, Any] = {
    **_SD,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
_XL_COMMON: Mapping[str, Any] = {
    "sample_size": 128,
    "layers_per_block": 2,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
}
_XL: Mapping[str, Any] = {
    **_XL_COMMON,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "projection_class_embeddings_input_dim": 2816,
}
_REFINER: Mapping[str, Any] = {
    **_XL_COMMON,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (384, 768, 1536, 1536),
    "cross_attention_dim": 1280,
    "attention_head_dim": (6, 12, 24, 24),
    "transformer_layers_per_block": 4,
    "projection_class_embeddings_input_dim": 2560,
}

_CASCADE_PRIOR: Mapping[str, Any] = {
    "clip_text_in_channels": 1280,
    "clip_image_in_channels": 768,
    "switch_level": (False,),
}
_CASCADE_PRIOR_LITE: Mapping[str, Any] = {
    **_CASCADE_PRIOR,
    "conditioning_dim": 1536,
    "block_out_channels": (1536, 1536),
    "num_attention_heads": (24, 24),
    "down_num_layers_per_block": (4, 12),
    "up_num_layers_per_block": (12, 4),
}
_TIMED = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
_ATTENDED = (*_TIMED, "SDCascadeAttnBlock")
_CASCADE_DECODER: Mapping[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "conditioning_dim": 1280,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_num_layers_per_block": (2, 6, 28, 6),
    "up_num_layers_per_block": (6, 28, 6, 2),
    "down_blocks_repeat_mappers": (1, 1, 1, 1),
    "up_blocks_repeat_mappers": (3, 3, 2, 2),
    "num_attention_heads": (0, 0, 20, 20),
    "block_types_per_layer": (_TIMED, _TIMED, _ATTENDED, _ATTENDED),
    "effnet_in_channels": 16,
    "pixel_mapper_in_channels": 3,
    "dropout": (0, 0, 0.1, 0.1),
    "timestep_conditioning_type": ("sca",),
}


def _pruned(down: tuple[Any, ...], up: tuple[Any, ...]) -> Mapping[str, Any]:
    """SDXL with fewer transformer blocks and none in the middle."""
    return {
        **_XL,
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": down,
        "reverse_transformer_layers_per_block": up,
    }


MODELS: Mapping[str, Model] = {
    "sd1-unet": Model(_CLASS, _SD1),
    "sd1-inpaint-unet": Model(_CLASS, {**_SD1, "in_channels": 9}),
    "sd1-pix2pix-unet": Model(_CLASS, {**_SD1, "in_channels": 8}),
    "sd2-unet": Model(_CLASS, _SD2),
    "sd2-inpaint-unet": Model(_CLASS, {**_SD2, "in_channels": 9}),
    "sd2-depth-unet": Model(_CLASS, {**_SD2, "in_channels": 5}),
    "sdxl-unet": Model(_CLASS, _XL),
    "sdxl-inpaint-unet": Model(_CLASS, {**_XL, "in_channels": 9}),
    "sdxl-refiner-unet": Model(_CLASS, _REFINER),
    "ssd1b-unet": Model(_CLASS, _pruned((1, (2, 2), (4, 4)), ((4, 4, 10), (2, 1, 1), 1))),
    "vega-unet": Model(_CLASS, _pruned((1, (1, 1), (2, 2)), ((2, 2, 2), (1, 1, 1), 1))),
    "kolors-unet": Model(
        _CLASS,
        {
            **_XL,
            "projection_class_embeddings_input_dim": 5632,
            "encoder_hid_dim": 4096,
            "encoder_hid_dim_type": "text_proj",
        },
    ),
    "cascade-prior": Model(_CASCADE, _CASCADE_PRIOR),
    "cascade-lite-prior": Model(_CASCADE, _CASCADE_PRIOR_LITE, note="hand-written"),
    "cascade-decoder": Model(_CASCADE, _CASCADE_DECODER),
    "kandinsky3-unet": Model("diffusers:Kandinsky3UNet", note="class defaults"),
    "svd-unet": Model("diffusers:UNetSpatioTemporalConditionModel"),
    "animatediff-sd1-unet": Model("diffusers:UNetMotionModel", {"cross_attention_dim": 768}, note="hand-written"),
    "amused-256-transformer": Model("diffusers:UVit2DModel", {"sample_size": 16}),
    "amused-512-transformer": Model("diffusers:UVit2DModel", {"sample_size": 32, "downsample": True, "upsample": True}),
}
