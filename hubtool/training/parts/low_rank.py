"""LoRA, LoCon and DoRA: PEFT's layers around the modules asked for, as fp32 parameters."""

from __future__ import annotations

import fnmatch
import re
from typing import Any

from hubtool.adapters.ir import Adapter
from hubtool.errors import UsageProblem
from hubtool.pipelines import adapter_of, live, load, unload
from hubtool.pipelines.lora import layer_parameters
from hubtool.training import seeds
from hubtool.training.bases.base import Base
from hubtool.training.config import AdapterPart, Config
from hubtool.training.parts.base import Group

NAME = "trained"  # of the adapter inside the pipeline
_ATTENTION = re.compile(r"(^|\.)(attn\d?|self_attn)\.")
_INSIDE = re.compile(r"(^|\.)(attentions|transformer_blocks|single_transformer_blocks|layers)\.")


class LowRankPart:
    """The denoiser's layers, and those of the CLIP text encoders where asked for."""

    def __init__(self, base: Base, config: Config) -> None:
        self.pipe, asked = base.pipe, config.adapter
        if asked.start:
            load(self.pipe, asked.start, name=NAME, trainable=True)
        else:
            _inject(base, asked, config.run.seed)
        self.groups = tuple(_groups(base, config))

    def after_step(self, step: int) -> None:
        """Low-rank factors need nothing."""

    def adapter(self) -> Adapter:
        return adapter_of(self.pipe, NAME)

    def remove(self) -> None:
        unload(self.pipe, NAME)


def chosen(model: Any, component: str, asked: AdapterPart) -> dict[str, tuple[int, float]]:
    """Live path -> (rank, alpha) of every module that gets a layer."""
    from torch import nn

    found = {}
    for path, module in model.named_modules():
        plain = type(module) in (nn.Linear, nn.Conv2d) and getattr(module, "groups", 1) == 1
        if not plain or not _named(component, path, asked.only):
            continue
        if type(module) is nn.Conv2d and max(module.kernel_size) > 1:
            if asked.conv_rank:
                found[path] = (asked.conv_rank, asked.conv_alpha)
        elif _within(path, asked.targets):
            found[path] = (asked.rank, asked.alpha)
    return {path: (_fitting(model.get_submodule(path), rank), alpha) for path, (rank, alpha) in found.items()}


def trained_encoders(base: Base) -> dict[str, Any]:
    """The text encoders that low-rank training changes: CLIP's, not T5."""
    pairs = live.encoders(base.pipe).items()
    return {name: encoder for name, (encoder, _) in pairs if type(encoder).__name__.startswith("CLIP")}


def _inject(base: Base, asked: AdapterPart, seed: int) -> None:
    models = {base.denoiser: getattr(base.pipe, base.denoiser)}
    models |= trained_encoders(base) if asked.text_encoders else {}
    wrapped = [_wrap(model, component, asked, seed) for component, model in models.items()]
    if not any(wrapped):
        raise UsageProblem("no module fits adapter.targets and adapter.only", hint=f"only = {list(asked.only)}")


def _wrap(model: Any, component: str, asked: AdapterPart, seed: int) -> bool:
    import torch
    from peft import LoraConfig

    modules = chosen(model, component, asked)
    if not modules:
        return False
    settings = LoraConfig(
        r=asked.rank, lora_alpha=asked.alpha, target_modules=sorted(modules), use_dora=asked.dora,
        use_rslora=asked.rank_stabilised, lora_dropout=asked.dropout,
        rank_pattern={path: rank for path, (rank, _) in modules.items() if rank != asked.rank},
        alpha_pattern={path: alpha for path, (_, alpha) in modules.items() if alpha != asked.alpha},
    )  # fmt: skip
    with live.aside():
        torch.manual_seed(seeds.number(seed, "factors", component))
        model.add_adapter(settings, adapter_name=NAME)
    return True


def _groups(base: Base, config: Config) -> list[Group]:
    rates, decay = config.optimiser, config.optimiser.weight_decay
    groups = []
    for component, model in live.components(base.pipe).items():
        held: dict[str, Any] = {}
        for path, layer in live.adapter_layers(model, NAME).items():
            for key, parameter in layer_parameters(layer, NAME).items():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
                held[f"{component}.{path}.{key}"] = parameter
        name, rate = ("denoiser", rates.rate) if component == base.denoiser else ("text", rates.text_rate)
        groups += [Group(name, held, rate, decay)] if held else []
    return groups


def _named(component: str, path: str, only: tuple[str, ...]) -> bool:
    return not only or any(fnmatch.fnmatchcase(f"{component}.{path}", pattern) for pattern in only)


def _within(path: str, targets: str) -> bool:
    return targets == "all" or bool((_ATTENTION if targets == "attention" else _INSIDE).search(path))


def _fitting(module: Any, rank: int) -> int:
    """Never more rank than the weight itself can have."""
    weight = module.weight
    return int(min(rank, weight.shape[0], weight[0].numel()))
