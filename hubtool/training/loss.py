"""From predictions to one number: weighted, masked, with the prior's part."""

from __future__ import annotations

from typing import Any


def per_image(prediction: Any, target: Any, weight: Any, mask: Any | None = None) -> Any:
    """(n,): the mean squared error of each image in fp32, times its weight.

    ``mask``: (n, 1, h, w) of weights; the mean is the weighted one, so that a small mask does not mean a small step.
    """
    error = (prediction.float() - target.float()) ** 2
    if mask is None:
        return error.flatten(1).mean(1) * weight.float()
    shares = mask.float().expand_as(error).flatten(1)
    return (error.flatten(1) * shares).sum(1) / shares.sum(1).clamp(min=1e-6) * weight.float()


def with_prior(losses: Any, own: int, prior_weight: float) -> tuple[Any, Any | None]:
    """mean(own images) + prior_weight * mean(class images), as DreamBooth has it (arXiv 2208.12242), and the prior's mean alone.

    ``own``: how many of ``losses`` (n,) belong to the images to learn; the others are class images.
    """
    if own == len(losses):
        return losses.mean(), None
    prior = losses[own:].mean()
    return losses[:own].mean() + prior_weight * prior, prior


def mask_for(latents: Any, weights: Any, floor: float) -> Any:
    """Weights (n, 1, H, W) of pixels as weights of latents, none below ``floor``."""
    import torch.nn.functional as F

    small = F.interpolate(weights, size=latents.shape[-2:], mode="area")
    return small.clamp(min=floor, max=1.0)
