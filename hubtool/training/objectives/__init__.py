"""What the denoiser is asked for: the noise, the velocity, or the flow."""

from __future__ import annotations

from typing import Any

from hubtool.errors import UsageProblem
from hubtool.training.config import Objective
from hubtool.training.objectives.base import Goal
from hubtool.training.objectives.diffusion import Diffusion
from hubtool.training.objectives.flow import Flow

__all__ = ["Goal", "make"]


def make(scheduler: Any, settings: Objective) -> Goal:
    """The objective of a base with this scheduler; ``settings.prediction`` overrides what the scheduler says."""
    own = _own(scheduler)
    wanted = own if settings.prediction == "auto" else settings.prediction
    if (wanted == "flow") != (own == "flow"):
        raise UsageProblem(f"the base's {type(scheduler).__name__} is made for {own}, not for {wanted}")
    return Flow(scheduler, settings) if wanted == "flow" else Diffusion(scheduler, settings, wanted)


def _own(scheduler: Any) -> str:
    if "FlowMatch" in type(scheduler).__name__:
        return "flow"
    return str(scheduler.config.get("prediction_type", "epsilon"))
