"""Flux 1: latents packed two by two into tokens, positions instead of a grid, and the guidance a distilled model is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hubtool.training.bases.base import Sizes, Words, present

_STEPS = 1000.0  # the transformer counts time from 0 to 1


class Flux:
    denoiser, inpainting = "transformer", False

    def __init__(self, pipe: Any, guidance: float) -> None:
        self.pipe, self.guidance = pipe, guidance

    def words(self, prompts: Sequence[str]) -> dict[str, Any]:
        texts = list(prompts)
        states, pooled, _ = self.pipe.encode_prompt(texts, texts, device=self.pipe.transformer.device)
        return {"states": states, "pooled": pooled}

    def predict(self, noisy: Any, times: Any, words: Words, sizes: Sizes) -> Any:
        import torch

        count, channels, height, width = noisy.shape
        places = self.pipe._prepare_latent_image_ids(count, height // 2, width // 2, noisy.device, noisy.dtype)
        told = self.pipe.transformer.config.guidance_embeds
        answer = self.pipe.transformer(
            hidden_states=self.pipe._pack_latents(noisy, count, channels, height, width),
            timestep=times / _STEPS,
            guidance=torch.full((count,), self.guidance, device=noisy.device) if told else None,
            pooled_projections=words["pooled"],
            encoder_hidden_states=words["states"],
            txt_ids=torch.zeros(words["states"].shape[1], 3, device=noisy.device, dtype=noisy.dtype),
            img_ids=places,
            return_dict=False,
        )[0]
        return unpacked(answer, height, width)


def unpacked(tokens: Any, height: int, width: int) -> Any:
    """(n, h/2 * w/2, 4c) back to (n, c, h, w): the inverse of ``FluxPipeline._pack_latents``."""
    count, _, channels = tokens.shape
    grid = tokens.view(count, height // 2, width // 2, channels // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(count, channels // 4, height, width)


def make(pipe: Any, guidance: float, clip_skip: int) -> Flux:
    """``clip_skip`` means nothing to Flux."""
    present(pipe, "vae", "transformer", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")
    return Flux(pipe, guidance)
