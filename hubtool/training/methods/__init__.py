"""A method is one file: which parts it trains, on which families, and which of them move at a step."""

from __future__ import annotations

from hubtool.errors import UsageProblem
from hubtool.training.methods import custom_diffusion, dreambooth, lora, pivotal, textual_inversion
from hubtool.training.methods.base import Method

METHODS = {
    one.METHOD.name: one.METHOD for one in (lora, dreambooth, textual_inversion, pivotal, custom_diffusion)
}  # fmt: skip
__all__ = ["METHODS", "Method", "method"]


def method(name: str) -> Method:
    """The method of this name. Raises ``UsageProblem``."""
    if name not in METHODS:
        raise UsageProblem(f"no such method of training: {name}", hint=f"one of {', '.join(METHODS)}")
    return METHODS[name]
