"""Stable Diffusion 1, 2 and XL, inpainting ones too: a UNet with cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hubtool.errors import Unsupported
from hubtool.training.bases.base import Sizes, Words, present

_PLAIN, _INPAINTING = 4, 9  # input channels


class UNet:
    """``clip_skip``: as the pipelines count, 1 leaves the last layer out."""

    denoiser = "unet"

    def __init__(self, pipe: Any, clip_skip: int) -> None:
        channels = pipe.unet.config.in_channels
        if channels not in (_PLAIN, _INPAINTING):
            raise Unsupported(f"a UNet with {channels} input channels cannot be trained here")
        self.pipe, self.clip_skip = pipe, clip_skip or None
        self.inpainting = channels == _INPAINTING
        self.large = getattr(pipe, "text_encoder_2", None) is not None

    def words(self, prompts: Sequence[str]) -> dict[str, Any]:
        asked = {
            "prompt": list(prompts), "device": self.pipe.unet.device, "num_images_per_prompt": 1,
            "do_classifier_free_guidance": False, "clip_skip": self.clip_skip,
        }  # fmt: skip
        found = self.pipe.encode_prompt(**asked)
        return {"states": found[0], "pooled": found[2]} if self.large else {"states": found[0]}

    def predict(self, noisy: Any, times: Any, words: Words, sizes: Sizes) -> Any:
        more = {}
        if self.large:
            more["added_cond_kwargs"] = {"text_embeds": words["pooled"], "time_ids": _time_ids(sizes, noisy)}
        return self.pipe.unet(
            noisy, times, encoder_hidden_states=words["states"], return_dict=False, **more
        )[0]  # fmt: skip


def _time_ids(sizes: Sizes, like: Any) -> Any:
    """SDXL's micro-conditioning (arXiv 2307.01952): original size, corner, target size, each as (height, width)."""
    import torch

    rows = [
        [*original[::-1], *corner[::-1], *cut[::-1]]
        for original, corner, cut in zip(sizes.original, sizes.corner, sizes.cut, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float32, device=like.device)


def make(pipe: Any, guidance: float, clip_skip: int) -> UNet:
    """``guidance`` means nothing to a UNet."""
    present(pipe, "vae", "unet", "text_encoder", "tokenizer", "scheduler")
    return UNet(pipe, clip_skip)
