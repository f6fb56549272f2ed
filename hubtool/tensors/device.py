"""Where tensors can be computed: the processor, and every GPU that torch drives through CUDA or ROCm."""

from __future__ import annotations

from hubtool.errors import UsageProblem


def devices() -> list[str]:
    """The names of the devices of this machine, ``cpu`` first. Imports torch."""
    import torch

    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def check_device(device: str) -> None:
    """Raise ``UsageProblem`` for a device that is not here, naming those that are. ``cuda`` is the first GPU."""
    if device == "cpu":  # the usual case, and it needs no torch
        return
    there = devices()
    if device not in (there if len(there) == 1 else [*there, "cuda"]):
        raise UsageProblem(f"torch cannot compute on {device!r} here", hint=f"this machine has {', '.join(there)}")
