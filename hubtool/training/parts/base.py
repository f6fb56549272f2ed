"""What every trained part gives to the loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from hubtool.adapters.ir import Adapter
from hubtool.tensors.dtypes import FROM_TORCH
from hubtool.tensors.expr import Literal


@dataclass(frozen=True, slots=True)
class Group:
    """fp32 parameters, by names that stay the same from run to run, with their learning rate and weight decay."""

    name: str  # denoiser, text or tokens
    parameters: Mapping[str, Any]
    rate: float
    decay: float


class Part(Protocol):
    groups: tuple[Group, ...]

    def after_step(self, step: int) -> None:
        """Called when the parameters have moved."""

    def adapter(self) -> Adapter:
        """What was trained, as it is now."""

    def remove(self) -> None:
        """Give the pipeline back as it was."""


def literal(tensor: Any, dtype: str = "float32") -> Literal:
    """The tensor's values in ``dtype`` as bytes of our own."""
    import torch

    value = tensor.detach().to("cpu", getattr(torch, dtype)).contiguous()
    flat = value.reshape(-1).view(torch.uint8)
    data = bytearray(flat.numel())
    torch.frombuffer(data, dtype=torch.uint8).copy_(flat)
    return Literal(bytes(data), FROM_TORCH[dtype], tuple(value.shape))
