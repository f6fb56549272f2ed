"""An exponential moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Average:
    """``decay`` counts from (1 + step) / (10 + step) upwards, so that the start is soon forgotten."""

    def __init__(self, parameters: Mapping[str, Any], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.held = {name: parameter.detach().clone() for name, parameter in parameters.items()} if decay else {}

    def update(self, step: int) -> None:
        import torch

        decay = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in self.held.items():
                value.lerp_(self.parameters[name].detach(), 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold the average inside the block, and their own bits after it."""
        own = {name: self.parameters[name].detach().clone() for name in self.held}
        self._put(self.held)
        try:
            yield
        finally:
            self._put(own)

    def _put(self, values: Mapping[str, Any]) -> None:
        import torch

        with torch.no_grad():
            for name, value in values.items():
                self.parameters[name].copy_(value)
