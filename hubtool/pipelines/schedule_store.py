"""A cache of tensors with a bound in bytes, for what returns in every run."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, eq=False)
class TensorStore:
    """Tensors by key, ``limit`` bytes at most. ``used``: bytes held; ``made``: tensors that had to be computed.

    What came first stays. A denoising loop asks for the same tensors in the same order again and again, and there a store that
    makes room for the newest throws each one out just before it is needed.
    """

    limit: int
    used: int = 0
    made: int = 0
    _held: dict[Hashable, Any] = field(default_factory=dict)

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The tensor of ``key``, from ``make`` where it is not held; it is kept when it fits."""
        if key in self._held:
            return self._held[key]
        tensor, self.made = make(), self.made + 1
        size = tensor.numel() * tensor.element_size()
        if self.used + size <= self.limit:
            self._held[key] = tensor
            self.used += size
        return tensor

    def clear(self) -> None:
        """Let go of everything."""
        self._held.clear()
        self.used = 0
