"""All weights of the denoiser, and of the text encoders where asked for: fine-tuning, as DreamBooth itself did it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hubtool.adapters.ir import Adapter
from hubtool.pipelines.families import family_of
from hubtool.training.bases.base import Base
from hubtool.training.config import Config
from hubtool.training.parts.base import Group
from hubtool.training.parts.low_rank import trained


class WeightsPart:
    """``models``: component -> model whose parameters train in fp32; ``kept``: their own values, in main memory."""

    def __init__(self, base: Base, config: Config) -> None:
        self.pipe, self.models = base.pipe, trained(base, config.adapter)
        self.kept = {
            (component, name): (parameter, parameter.detach().to("cpu", copy=True))
            for component, model in self.models.items()
            for name, parameter in model.named_parameters()
        }
        rates, decay = config.optimiser, config.optimiser.weight_decay
        self.groups: tuple[Group, ...] = tuple(
            Group(*("denoiser", self._trainable(one), rates.rate) if one == base.denoiser else ("text", self._trainable(one), rates.text_rate), decay)
            for one in self.models
        )  # fmt: skip

    def _trainable(self, component: str) -> dict[str, Any]:
        held = {f"{component}.{name}": one for (own, name), (one, _) in self.kept.items() if own == component}
        for parameter in held.values():
            parameter.data = parameter.data.float().clone()
            parameter.requires_grad_(True)
        return held

    def after_step(self, step: int) -> None:
        """Weights need nothing."""

    def adapter(self) -> Adapter:
        """Nothing: whole weights are no adapter."""
        return Adapter(family_of(self.pipe), {})

    def round(self, dtype: str) -> None:
        """Put the parameters into ``dtype``, in which they are written. No step can follow."""
        import torch

        for parameter, _ in self.kept.values():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(getattr(torch, dtype))

    @contextmanager
    def untrained(self) -> Iterator[None]:
        """The models have their own weights inside the block."""
        trained = [parameter.data for parameter, _ in self.kept.values()]
        self.remove()
        try:
            yield
        finally:
            for (parameter, _), value in zip(self.kept.values(), trained, strict=True):
                parameter.data = value

    def remove(self) -> None:
        for parameter, own in self.kept.values():
            parameter.data = own.to(parameter.device)
