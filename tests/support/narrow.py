"""Narrow pipelines with the head counts, group counts and rotary axes of the published models, so that hubtool's tables configure them rightly.

The tiny ones of the product shrink heads too, which no weight tells; a single file of these opens without any configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hubtool.pipelines.tiny import build
from hubtool.pipelines.tiny.latents import ddim, flow
from hubtool.pipelines.tiny.recipe import part
from hubtool.pipelines.tiny.tokenizers import t5_words, vocabulary

_BETAS: Any = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_DOWN, _UP, _PLAIN = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D", ("DownBlock2D", "UpBlock2D")


def unet(channels: tuple[int, ...], cross: tuple[bool, ...], context: int, **config: Any) -> Any:
    return part(
        "UNet2DConditionModel", block_out_channels=channels, cross_attention_dim=context, layers_per_block=2,
        down_block_types=tuple(_DOWN if one else _PLAIN[0] for one in cross),
        up_block_types=tuple(_UP if one else _PLAIN[1] for one in reversed(cross)), **{"sample_size": 64, "in_channels": 4, **config},
    )()  # fmt: skip


def vae(channels: int, **config: Any) -> Any:
    return part(
        "AutoencoderKL", block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=channels, **config,
    )()  # fmt: skip


def clip(heads: int, layers: int, *, projected: bool = False, **config: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    width = 2 * heads
    own = CLIPTextConfig(
        vocab_size=len(vocabulary()), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=heads,
        hidden_act="quick_gelu" if heads == 12 else "gelu", bos_token_id=0, eos_token_id=2, pad_token_id=1,
        **{"projection_dim": width, **config},
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(own).eval()


def t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(t5_words()), d_model=width, d_kv=64, d_ff=2 * width, num_layers=2, num_heads=1, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def sd1(**config: Any) -> Any:
    own = unet((32, 32, 64, 64), (True, True, True, False), 24, attention_head_dim=8, **config)
    return _like("sd1", unet=own, vae=vae(4, scaling_factor=0.18215), text_encoder=clip(12, 12), scheduler=_pndm())


def inpainting() -> Any:
    """SD 1 with nine input channels."""
    from diffusers import StableDiffusionInpaintPipeline

    return StableDiffusionInpaintPipeline(**sd1(in_channels=9).components, requires_safety_checker=False)


def sd2() -> Any:
    own = unet(
        (160,) * 4, (True, True, True, False), 32, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
    )
    parts = {"unet": own, "vae": vae(4, scaling_factor=0.18215), "text_encoder": clip(16, 23, projection_dim=512)}
    return _like("sd2", scheduler=ddim("epsilon")(), **parts)


def sdxl() -> Any:
    own = unet(
        (32, 160, 160), (False, True, True), 64, attention_head_dim=(5, 10, 20), use_linear_projection=True,
        transformer_layers_per_block=(1, 1, 2), addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=40 + 6 * 256,
    )  # fmt: skip
    encoders = {"text_encoder": clip(12, 12), "text_encoder_2": clip(20, 32, projected=True)}
    return _like("sdxl", unet=own, vae=vae(4, scaling_factor=0.13025), scheduler=_euler(), **encoders)


def sd3() -> Any:
    transformer = part(
        "SD3Transformer2DModel", sample_size=128, num_layers=2, num_attention_heads=2, joint_attention_dim=64, caption_projection_dim=128,
        pooled_projection_dim=64, pos_embed_max_size=16,
    )()  # fmt: skip
    encoders = {
        "text_encoder": clip(12, 12, projected=True),
        "text_encoder_2": clip(20, 32, projected=True),
        "text_encoder_3": t5(64),
    }
    return _like("sd3", transformer=transformer, vae=_shifted(1.5305, 0.0609), scheduler=flow(shift=3.0)(), **encoders)


def flux1() -> Any:
    transformer = part(
        "FluxTransformer2DModel", num_layers=2, num_single_layers=2, num_attention_heads=1, joint_attention_dim=64,
        pooled_projection_dim=24, guidance_embeds=True,
    )()  # fmt: skip
    parts = {"text_encoder": clip(12, 12), "text_encoder_2": t5(64), "vae": _shifted(0.3611, 0.1159)}
    return _like("flux1", transformer=transformer, scheduler=flow(shift=3.0, use_dynamic_shifting=True)(), **parts)


MAKERS: dict[str, Callable[[], Any]] = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl, "sd3": sd3, "flux1": flux1}


def make(family: str) -> Any:
    """A narrow pipeline of a family; the same bits every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MAKERS[family]()


def _shifted(scale: float, shift: float) -> Any:
    return vae(16, scaling_factor=scale, shift_factor=shift, use_quant_conv=False, use_post_quant_conv=False)


def _pndm() -> Any:
    from diffusers import PNDMScheduler

    return PNDMScheduler(**_BETAS, skip_prk_steps=True, set_alpha_to_one=False)


def _euler() -> Any:
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading")


def _like(family: str, **parts: Any) -> Any:
    """The tiny pipeline with other parts."""
    tiny = build(family)
    made = type(tiny)(
        **{**tiny.components, **parts}, **({"requires_safety_checker": False} if family in ("sd1", "sd2") else {})
    )
    made.set_progress_bar_config(disable=True)
    return made
