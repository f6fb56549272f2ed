"""Rectified flow, as SD 3 and Flux are trained: noisy = (1 - s) x + s e, target e - x.

Esser et al. 2024 (arXiv 2403.03206), section 3: times drawn logit-normally, shifted by the scheduler's ``shift``.
"""

from __future__ import annotations

import math
from typing import Any

from hubtool.training.config import Objective
from hubtool.training.objectives.base import Task


class Flow:
    """``times`` are s times the scheduler's number of steps (1000), which is what both transformers' pipelines count in."""

    name = "flow"

    def __init__(self, scheduler: Any, settings: Objective) -> None:
        config = scheduler.config
        self.steps = int(config.get("num_train_timesteps", 1000))
        self.dynamic = bool(config.get("use_dynamic_shifting", False))
        self.shift = float(config.get("shift", 1.0))
        self.config = config
        self.sampling = "logit-normal" if settings.sampling == "auto" else settings.sampling

    def task(self, latents: Any, noise: Any, uniform: Any, normal: Any) -> Task:
        import torch

        drawn = normal.sigmoid() if self.sampling == "logit-normal" else uniform
        share = self.shifted(drawn, latents.shape[-1] * latents.shape[-2] / 4.0).to(latents.device)
        s = share.to(latents.dtype).view(-1, 1, 1, 1)
        noisy = (1.0 - s) * latents + s * noise
        return Task(
            noisy, share.to(latents.dtype) * self.steps, noise - latents, torch.ones_like(share).to(latents.dtype)
        )

    def shifted(self, drawn: Any, tokens: float) -> Any:
        """k s / (1 + (k - 1) s). k is the scheduler's ``shift``, or grows with the number of image tokens where it says so (Flux)."""
        factor = math.exp(self._line(tokens)) if self.dynamic else self.shift
        return factor * drawn / (1.0 + (factor - 1.0) * drawn)

    def _line(self, tokens: float) -> float:
        """FluxPipeline's ``calculate_shift``: a straight line through two published points."""
        low, high = self.config.get("base_image_seq_len", 256), self.config.get("max_image_seq_len", 4096)
        least, most = self.config.get("base_shift", 0.5), self.config.get("max_shift", 1.15)
        return float(least + (tokens - low) * (most - least) / (high - low))
