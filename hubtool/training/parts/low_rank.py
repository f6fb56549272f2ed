"""LoRA, LoCon and DoRA: PEFT's layers around the modules asked for, as fp32 parameters."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hubtool.adapters.ir import Adapter
from hubtool.errors import UsageProblem
from hubtool.pipelines import adapter_of, live, load, unload
from hubtool.pipelines.families import family_of
from hubtool.pipelines.lora import layer_parameters, take_out
from hubtool.pipelines.saving import layers_of
from hubtool.pipelines.targets import weight_shape
from hubtool.training import seeds
from hubtool.training.bases.base import Base
from hubtool.training.config import AdapterPart, Config
from hubtool.training.parts.base import Group
from hubtool.training.quantised import linear_classes

NAME = "trained"  # of the adapter inside the pipeline
_ATTENTION = re.compile(r"(^|\.)(attn\d?|self_attn|SelfAttention)\.")
_INSIDE = re.compile(r"(^|\.)(attentions|transformer_blocks|single_transformer_blocks|layers|block)\.")  # block: T5's


class LowRankPart:
    """The denoiser's layers, and those of the text encoders where asked for.

    diffusers' loaders do not know T5: ``alone`` holds the models that only PEFT itself serves.
    """

    def __init__(self, base: Base, config: Config) -> None:
        self.pipe, asked = base.pipe, config.adapter
        self.alone = {
            name: model for name, model in trained(base, asked).items() if name not in live.components(base.pipe)
        }
        if asked.start:
            load(self.pipe, asked.start, name=NAME, trainable=True)
        else:
            _inject(base, asked, config.run.seed)
        self.groups = tuple(_groups(base, config, self.alone))

    def after_step(self, step: int) -> None:
        """Low-rank factors need nothing."""

    def adapter(self) -> Adapter:
        served = (
            adapter_of(self.pipe, NAME) if NAME in live.adapter_names(self.pipe) else Adapter(family_of(self.pipe), {})
        )
        more = {key: patch for c, model in self.alone.items() for key, patch in layers_of(model, c, NAME).items()}
        return replace(served, patches={**served.patches, **more})

    def remove(self) -> None:
        for model in self.alone.values():
            take_out(model, NAME)
        if NAME in live.adapter_names(self.pipe):
            unload(self.pipe, NAME)


def chosen(model: Any, component: str, asked: AdapterPart) -> dict[str, tuple[int, float]]:
    """Live path -> (rank, alpha) of every module that gets a layer."""
    from torch import nn

    found = {}
    for path, module in model.named_modules():
        plain = type(module) in (*linear_classes(), nn.Conv2d) and getattr(module, "groups", 1) == 1
        if not plain or not _named(component, path, asked.only):
            continue
        if type(module) is nn.Conv2d and max(module.kernel_size) > 1:
            if asked.conv_rank:
                found[path] = (asked.conv_rank, asked.conv_alpha)
        elif _within(path, asked.targets):
            found[path] = (asked.rank, asked.alpha)
    return {path: (_fitting(model.get_submodule(path), rank), alpha) for path, (rank, alpha) in found.items()}


def trained_encoders(base: Base, asked: AdapterPart) -> dict[str, Any]:
    """The text encoders that ``asked`` trains: CLIP's, T5, both or none."""
    pairs = live.encoders(base.pipe).items()
    return {name: encoder for name, (encoder, _) in pairs if trains_encoder(encoder, asked)}


def trains_encoder(encoder: Any, asked: AdapterPart) -> bool:
    """Whether a text encoder is one of those asked for, by its class."""
    kind = type(encoder).__name__
    return (kind.startswith("CLIP") and asked.text_encoders) or ("T5" in kind and asked.t5)


def trained(base: Base, asked: AdapterPart) -> dict[str, Any]:
    """Component -> model of everything that ``asked`` trains."""
    return {base.denoiser: getattr(base.pipe, base.denoiser), **trained_encoders(base, asked)}


def _inject(base: Base, asked: AdapterPart, seed: int) -> None:
    wrapped = [_wrap(model, component, asked, seed) for component, model in trained(base, asked).items()]
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


def _groups(base: Base, config: Config, alone: Mapping[str, Any]) -> list[Group]:
    rates, decay = config.optimiser, config.optimiser.weight_decay
    groups = []
    for component, model in {**live.components(base.pipe), **alone}.items():
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
    """Never more rank than the weight itself can have; a quantised one packs its numbers."""
    shape = weight_shape(module) or ()
    return min(rank, shape[0], math.prod(shape[1:]))
