"""Tiny autoencoders and the schedulers of the published pipelines."""

from __future__ import annotations

from functools import partial
from typing import Any

from hubtool.pipelines.tiny.recipe import Part, part


def kl(channels: int = 4, **config: Any) -> Part:
    """The autoencoder of Stable Diffusion and those after it: 64 x 64 pixels become 8 x 8 latents of ``channels``."""
    return part(
        "AutoencoderKL", block_out_channels=(4, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=channels, norm_num_groups=4, sample_size=64, **config,
    )  # fmt: skip


def shifted(channels: int) -> Part:
    """The same with latents that are shifted before they are scaled, and without the convolutions at the quantiser: SD 3, Flux."""
    return kl(channels, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)


def qwen(channels: int) -> Part:
    """Qwen-Image's autoencoder of single frames, eight pixels to a latent."""
    return part(
        "AutoencoderKLQwenImage", base_dim=4, z_dim=channels, num_res_blocks=2, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * channels, latents_std=[1.0] * channels,
    )  # fmt: skip


def flow(**config: Any) -> Part:
    """Flow matching by Euler's method."""
    return partial(_scheduler, "FlowMatchEulerDiscreteScheduler", config)


def ddim(prediction: str) -> Part:
    """DDIM as Stable Diffusion is configured, which draws no noise on the way."""
    config = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False,
        "steps_offset": 1, "prediction_type": prediction,
    }  # fmt: skip
    return partial(_scheduler, "DDIMScheduler", config)


def dpm() -> Part:
    """DPM-Solver++ as PixArt is configured."""
    return partial(_scheduler, "DPMSolverMultistepScheduler", {"beta_start": 0.0001, "beta_end": 0.02})


def _scheduler(name: str, config: dict[str, Any]) -> Any:
    import diffusers

    return getattr(diffusers, name)(**config)
