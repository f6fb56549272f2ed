"""Tiny pipelines around a UNet: Stable Diffusion 1, 2 and XL whole, the XL refiner, Kolors, Kandinsky 3 and Stable Cascade without the rest.

Channel ratios stay 1:2:4:4 so that ``conv_shortcut`` appears where the real UNet has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hubtool.pipelines.tiny.encoders import clip
from hubtool.pipelines.tiny.latents import ddim, kl
from hubtool.pipelines.tiny.recipe import Part, Recipe, part, value
from hubtool.pipelines.tiny.tokenizers import tokenizer

_CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
_PLAIN = ("DownBlock2D", "UpBlock2D")
_SD_BLOCKS = (True, True, True, False)
_XL_BLOCKS = (False, True, True)


def unet(channels: tuple[int, ...], cross: tuple[bool, ...], context: int, **config: Any) -> Part:
    """A UNet with cross-attention (of width ``context``) in the blocks that ``cross`` names."""
    return part(
        "UNet2DConditionModel", sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, norm_num_groups=4,
        block_out_channels=channels, cross_attention_dim=context,
        down_block_types=tuple((_CROSS if one else _PLAIN)[0] for one in cross),
        up_block_types=tuple((_CROSS if one else _PLAIN)[1] for one in reversed(cross)), **config,
    )  # fmt: skip


_UNCHECKED = {"safety_checker": value(None), "feature_extractor": value(None), "requires_safety_checker": value(False)}
_XL_UNET = {
    "use_linear_projection": True, "attention_head_dim": (2, 4, 8), "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24 + 6 * 8,
}  # fmt: skip
_REFINER_UNET = {
    "use_linear_projection": True, "attention_head_dim": (2, 4, 8, 8), "transformer_layers_per_block": 4,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24 + 5 * 8,
}  # fmt: skip


def _sd(width: int, layers: int, prediction: str = "epsilon", **config: Any) -> Recipe:
    channels = (16, 32, 64, 64)
    parts = {"vae": kl(), "unet": unet(channels, _SD_BLOCKS, width, **config), "scheduler": ddim(prediction)}
    encoder = {"text_encoder": clip(width, layers), "tokenizer": tokenizer}
    return Recipe("StableDiffusionPipeline", {**parts, **encoder, **_UNCHECKED}, whole=True)


def _sdxl() -> Recipe:
    parts = {"vae": kl(), "unet": unet((16, 32, 64), _XL_BLOCKS, 40, **_XL_UNET), "scheduler": ddim("epsilon")}
    first = {"text_encoder": clip(16, 12), "tokenizer": tokenizer}
    second = {"text_encoder_2": clip(24, 32, projected=True), "tokenizer_2": tokenizer}
    return Recipe(
        "StableDiffusionXLPipeline", {**parts, **first, **second, "add_watermarker": value(False)}, whole=True
    )


_REFINER = {
    "unet": unet((16, 32, 64, 64), (False, True, True, False), 24, **_REFINER_UNET),
    "text_encoder_2": clip(24, 32, projected=True), "add_watermarker": value(False), "requires_aesthetics_score": value(True),
}  # fmt: skip
_KOLORS = {"unet": unet((16, 32, 64), _XL_BLOCKS, 40, encoder_hid_dim=32, encoder_hid_dim_type="text_proj", **_XL_UNET)}
_KANDINSKY3 = part(
    "Kandinsky3UNet", time_embedding_dim=16, groups=2, attention_head_dim=4, layers_per_block=3, block_out_channels=(8, 16, 24, 32),
    cross_attention_dim=12, encoder_hid_dim=10,
)  # fmt: skip
_PRIOR = part(
    "StableCascadeUNet", in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, conditioning_dim=16,
    block_out_channels=(16, 16), num_attention_heads=(2, 2), clip_text_in_channels=12, clip_text_pooled_in_channels=10,
    clip_image_in_channels=8, switch_level=(False,),
)  # fmt: skip

RECIPES: Mapping[str, Recipe] = MappingProxyType({
    "sd1": _sd(32, 12, attention_head_dim=4),
    "sd2": _sd(24, 23, "v_prediction", use_linear_projection=True, attention_head_dim=(2, 4, 8, 8)),
    "sdxl": _sdxl(),
    "sdxl-refiner": Recipe("StableDiffusionXLImg2ImgPipeline", _REFINER),
    "kolors": Recipe("KolorsPipeline", _KOLORS),
    "kandinsky3": Recipe("Kandinsky3Pipeline", {"unet": _KANDINSKY3}),
    "cascade": Recipe("StableCascadePriorPipeline", {"prior": _PRIOR}),
})  # fmt: skip
