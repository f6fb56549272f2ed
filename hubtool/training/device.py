"""Where and how precisely to compute."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hubtool.errors import UsageProblem
from hubtool.training.config import Run
from hubtool.training.team import own_device

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Place:
    """``dtype``: of frozen weights and of activations; trained parameters are fp32 everywhere. ``offload``: idle models wait elsewhere."""

    device: Any
    dtype: Any
    offload: bool = False

    @property
    def mixed(self) -> bool:
        import torch

        return bool(self.dtype != torch.float32)

    @contextmanager
    def precise(self) -> Iterator[None]:
        """Autocast to ``dtype``."""
        import torch

        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.mixed):
            yield

    @contextmanager
    def lent(self, *models: Any) -> Iterator[None]:
        """Idle models are on the device inside the block."""
        waiting = [model for model in models if self.offload and model is not None and model.device.type == "cpu"]
        for model in waiting:
            moved(model, self.device)
        try:
            yield
        finally:
            for model in waiting:
                moved(model, "cpu")

    def scaler(self) -> Any:
        """Keeps fp16 gradients from vanishing; does nothing in other precisions."""
        import torch

        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


def moved(model: Any, device: Any, dtype: Any = None) -> None:
    """``model.to``, without what the classes of diffusers say about it."""
    from torch import nn

    nn.Module.to(model, device=device, dtype=dtype)


def place(run: Run) -> Place:
    """Raises ``UsageProblem`` for a device that is not there."""
    import torch

    device = torch.device(_best() if run.device == "auto" else _known(run.device))
    precision = _auto(device) if run.precision == "auto" else run.precision
    return Place(device, getattr(torch, _DTYPES[precision]), run.offload)


def _known(name: str) -> str:
    import torch

    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise UsageProblem(f"{name!r} is no device", hint="auto, cpu, cuda, cuda:1 or mps") from None
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise UsageProblem(f"there is no {kind} here", hint="--set run.device=cpu")
    return name


def _best() -> str:
    import torch

    if torch.cuda.is_available():
        return own_device() if "LOCAL_RANK" in os.environ else "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _auto(device: Any) -> str:
    import torch

    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
