"""Prompts to tensors; encoded once and kept while no text encoder and no token is trained."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from hubtool.pipelines import live
from hubtool.training.bases.base import Base
from hubtool.training.device import Place

_KEPT = 4096  # prompts


class Texts:
    def __init__(self, base: Base, place: Place, *, frozen: bool) -> None:
        self.base, self.place, self.frozen = base, place, frozen
        self.encoders = [encoder for encoder, _ in live.encoders(base.pipe).values()]
        self.kept: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def words(self, prompts: Sequence[str], device: Any) -> dict[str, Any]:
        """What the denoiser is told about each prompt. Frozen ones are encoded one by one, so that no batch changes another's bits."""
        import torch

        if not self.frozen:
            return self.base.words(prompts)
        new = [prompt for prompt in prompts if prompt not in self.kept]
        with self.place.lent(*(self.encoders if new else ())):
            rows = [self._one(prompt) for prompt in prompts]
        return {name: torch.cat([row[name] for row in rows]).to(device) for name in rows[0]}

    def _one(self, prompt: str) -> dict[str, Any]:
        import torch

        if prompt not in self.kept:
            with torch.no_grad():
                self.kept[prompt] = {name: value.cpu() for name, value in self.base.words([prompt]).items()}
            if len(self.kept) > _KEPT:
                self.kept.popitem(last=False)
        self.kept.move_to_end(prompt)
        return self.kept[prompt]
