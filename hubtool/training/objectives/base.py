"""What every objective gives to the loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Task:
    """Noisy latents (n, c, h, w) with what the denoiser is told and what it shall answer. ``times``: (n,); ``weight``: (n,) of the loss."""

    noisy: Any
    times: Any
    target: Any
    weight: Any


class Goal(Protocol):
    name: str

    def task(self, latents: Any, noise: Any, uniform: Any, normal: Any) -> Task:
        """Make ``latents`` noisy. ``noise``: as latents; ``uniform`` in [0, 1) and ``normal``: one random number for each image."""
