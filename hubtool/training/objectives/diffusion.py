"""Denoising diffusion: predict the noise (epsilon) or the velocity, with min-SNR weighting.

Ho et al. 2020 (arXiv 2006.11239); velocity: Salimans and Ho 2022 (arXiv 2202.00512); min-SNR: Hang et al. 2023 (arXiv 2303.09556).
"""

from __future__ import annotations

from typing import Any

from hubtool.errors import UsageProblem
from hubtool.training.config import Objective
from hubtool.training.objectives.base import Task


class Diffusion:
    """noisy = sqrt(a) x + sqrt(1 - a) e; the target is e, or sqrt(a) e - sqrt(1 - a) x. ``a``: the scheduler's ``alphas_cumprod``."""

    def __init__(self, scheduler: Any, settings: Objective, prediction: str) -> None:
        from diffusers import DDPMScheduler

        if prediction not in ("epsilon", "v_prediction"):
            raise UsageProblem(f"a base that predicts {prediction} cannot be trained here")
        self.name, self.gamma, self.offset = prediction, settings.snr_gamma, settings.noise_offset
        self.alphas = DDPMScheduler.from_config(scheduler.config).alphas_cumprod.double()

    def task(self, latents: Any, noise: Any, uniform: Any, normal: Any) -> Task:
        times = (uniform * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)
        kept = self.alphas[times.cpu()]  # fp64 stays in main memory: not every device has it
        signal, spread = (_like(root.sqrt(), latents).view(-1, 1, 1, 1) for root in (kept, 1.0 - kept))
        target = noise if self.name == "epsilon" else signal * noise - spread * latents
        return Task(signal * latents + spread * noise, times, target, _like(self.weight(kept), latents))

    def weight(self, kept: Any) -> Any:
        """min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for the velocity; 1 without gamma. SNR = a / (1 - a)."""
        import torch

        if not self.gamma:
            return torch.ones_like(kept)
        ratio = kept / (1.0 - kept)
        least = ratio.clamp(max=self.gamma)
        if self.name == "v_prediction":
            return least / (ratio + 1.0)
        return torch.where(ratio > 0, least / ratio.clamp(min=1e-20), torch.ones_like(ratio))


def _like(values: Any, latents: Any) -> Any:
    return values.to(latents.dtype).to(latents.device)
