"""Runs of tiny pipelines under a schedule, watched at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hubtool.adapters.ir import Adapter, Patch
from hubtool.adapters.registry import make as make_patch
from tests.support import tiny

STEPS = 4
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
UP_Q = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
FF = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"


def rand(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.3


def patch(algorithm: str, tensors: dict[str, torch.Tensor], alpha: float | None = None) -> Patch:
    return make_patch(algorithm, {role: tiny.literal(tensor) for role, tensor in tensors.items()}, alpha)


HADA = {
    f"hada_w{i}_{side}": rand(16, 2, seed=i) if side == "a" else rand(2, 16, seed=i) for i in (1, 2) for side in "ab"
}


def loha() -> Adapter:
    return Adapter(None, {("unet", Q): patch("loha", HADA)})


def run(pipe: Any, steps: int = STEPS, **how: Any) -> torch.Tensor:
    inputs: dict[str, Any] = {"prompt": "a cat"}
    if hasattr(pipe, "transformer"):
        inputs = {"prompt_embeds": rand(1, 6, 12), "pooled_prompt_embeds": rand(1, 8)}
    noise = torch.Generator().manual_seed(0)
    options = {"height": 64, "width": 64, "generator": noise, "output_type": "latent", "num_inference_steps": steps}
    return pipe(**inputs, **options, **how).images


def denoiser(pipe: Any) -> Any:
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def watched(pipe: Any, look: Callable[[], Any], **how: Any) -> list[Any]:
    """What ``look`` sees each time the denoiser runs."""
    seen: list[Any] = []
    handle = denoiser(pipe).register_forward_pre_hook(lambda *_: seen.append(look()))
    try:
        run(pipe, **how)
    finally:
        handle.remove()
    return seen


def weight(pipe: Any, path: str = Q, parameter: str = "weight") -> torch.Tensor:
    return getattr(denoiser(pipe).get_submodule(path), parameter).detach().clone()


def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = tiny.build("flux1")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.set_progress_bar_config(disable=True)
    return pipe
