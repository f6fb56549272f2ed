"""What the loop asks of an architecture, and what all of them share: latents and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hubtool.errors import Unsupported

Words = Mapping[str, Any]  # name -> (n, ...) tensors of a text


@dataclass(frozen=True, slots=True)
class Sizes:
    """(width, height) of each image in its file, the corner of the cut, and the cut: what SDXL is told."""

    original: Sequence[tuple[int, int]]
    corner: Sequence[tuple[int, int]]
    cut: Sequence[tuple[int, int]]


class Base(Protocol):
    pipe: Any
    denoiser: str
    inpainting: bool

    def words(self, prompts: Sequence[str]) -> dict[str, Any]:
        """What the text encoders make of ``prompts``: tensors with the prompts in dimension 0."""

    def predict(self, noisy: Any, times: Any, words: Words, sizes: Sizes) -> Any:
        """The denoiser's answer (n, c, h, w). ``noisy`` has the inpainting channels already, where there are any."""


def encoded(vae: Any, pixels: Any) -> tuple[Any, Any]:
    """Mean and standard deviation of the latents of ``pixels``, not yet scaled, fp32 in main memory."""
    import torch

    with torch.no_grad():
        found = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    return found.mean.float().cpu(), found.std.float().cpu()


def drawn(vae: Any, mean: Any, std: Any, noise: Any) -> Any:
    """Latents as the denoiser knows them: (mean + std * noise - shift) * scale."""
    shift = vae.config.get("shift_factor") or 0.0
    return (mean + std * noise - shift) * float(vae.config.scaling_factor)


def present(pipe: Any, *names: str) -> None:
    """Raise ``Unsupported`` unless the pipeline has these parts."""
    missing = [name for name in names if getattr(pipe, name, None) is None]
    if missing:
        raise Unsupported(f"this {type(pipe).__name__} has no {', '.join(missing)}, which training needs")
