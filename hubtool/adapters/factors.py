"""Factors: a method whose algebra needs more than its file holds, kept as named tensors. Every rename is exact; anything else is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hubtool.adapters.weight_ops import WeightOp
from hubtool.errors import Unsupported
from hubtool.tensors.expr import Expr


@dataclass(frozen=True, slots=True)
class Factors:
    """Tensors of one module by role; ``alpha_value`` is the value of ``alpha`` when stored."""

    algorithm: str
    tensors: Mapping[str, Expr]
    alpha_value: float | None = None

    @property
    def rank(self) -> int | None:
        return None

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def dora_scale(self) -> Expr | None:
        return self.tensors.get("dora_scale")

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def weight_shape(self) -> None:
        return None

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        return None, None

    def roles(self) -> Iterator[tuple[str, Expr]]:
        yield from self.tensors.items()

    def check(self, name: str) -> None:
        """Nothing is known about these tensors that could be checked."""

    def under(self, op: WeightOp) -> Factors:
        raise Unsupported(f"{self.algorithm} under {type(op).__name__}")

    def delta(self, base: Any = None) -> Any:
        raise Unsupported(f"the change of a {self.algorithm} module")

    def bias_delta(self, base_bias: Any = None) -> Any | None:
        raise Unsupported(f"the change of a {self.algorithm} module")
