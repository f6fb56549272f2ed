"""QLoRA (arXiv 2305.14314): the denoiser's frozen linear layers in four bits of bitsandbytes' NormalFloat while low-rank layers train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from hubtool.errors import MissingExtra, UsageProblem
from hubtool.training.config import Config
from hubtool.training.device import Place

_LOW_RANK = ("lora", "dreambooth", "pivotal")


def check(config: Config) -> None:
    """Raise ``UsageProblem`` where quantised weights would have to move, ``MissingExtra`` without bitsandbytes."""
    if config.run.quantise == "none":
        return
    if config.adapter.full or config.method not in _LOW_RANK:
        raise UsageProblem("quantised weights cannot train", hint=f"low-rank layers can: {', '.join(_LOW_RANK)}")
    if find_spec("bitsandbytes") is None:
        error = MissingExtra("quantised weights", "train")
        error.hint = "pip install bitsandbytes"  # for CUDA above all, so it is not in the extra
        raise error


@contextmanager
def quantised(model: Any, config: Config, place: Place) -> Iterator[None]:
    """The linear layers of ``model`` that are frozen are in four bits inside the block; afterwards they are what they were."""
    from torch import nn

    plain = [(path, one) for path, one in model.named_modules() if type(one) is nn.Linear]
    if config.run.quantise == "none":
        yield
        return
    for path, module in plain:
        _put(model, path, _four_bits(module, place))
    model.is_loaded_in_4bit = True  # how PEFT knows which layers to wrap these with
    try:
        yield
    finally:
        del model.is_loaded_in_4bit
        for path, module in plain:
            _put(model, path, module.to(place.device))


def linear_classes() -> tuple[type, ...]:
    """What counts as a linear layer: torch's own, and the quantised ones where there are any."""
    import sys

    from torch import nn

    nn4 = sys.modules.get("bitsandbytes.nn")
    return (nn.Linear,) if nn4 is None else (nn.Linear, nn4.Linear4bit)


def _four_bits(module: Any, place: Place) -> Any:
    """A quantised copy on the device; the original waits in main memory, with all its bits."""
    nn4 = import_module("bitsandbytes.nn")
    made = nn4.Linear4bit(
        module.in_features, module.out_features, module.bias is not None, compute_dtype=place.dtype, quant_type="nf4"
    )
    made.weight = nn4.Params4bit(module.weight.detach().to("cpu", copy=True), requires_grad=False, quant_type="nf4")
    if module.bias is not None:
        made.bias = module.bias
    module.to("cpu")
    return made.to(place.device).requires_grad_(False)


def _put(model: Any, path: str, module: Any) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
