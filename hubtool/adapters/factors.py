"""Factors: an adapter algorithm kept as named tensors. Every rename is exact; any other operation on the base weight is refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hubtool.adapters.weight_ops import WeightOp
from hubtool.errors import Unsupported
from hubtool.tensors.expr import Expr
from hubtool.types import Shape

# How a module's rank reads off its factors: first role present -> dimension of that tensor.
_RANK_DIMENSION = (
    ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0), ("oft_blocks", 0), ("oft_R", 0), ("b2", 0),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Factors:
    """Tensors of one module by role (``lokr_w1``, ``hada_w2_b``, ``diff`` ...); ``alpha_value`` is the value of ``alpha`` when stored."""

    algorithm: str
    tensors: Mapping[str, Expr]
    alpha_value: float | None = None

    @property
    def rank(self) -> int | None:
        for role, dimension in _RANK_DIMENSION:
            if role in self.tensors:
                return self.tensors[role].shape[dimension]
        return None

    @property
    def dora_scale(self) -> Expr | None:
        return self.tensors.get("dora_scale")

    @property
    def weight_shape(self) -> Shape | None:
        """Known only where a role has the weight's own shape."""
        full = self.tensors.get("diff", self.tensors.get("set_weight"))
        return None if full is None else full.shape

    def roles(self) -> Iterator[tuple[str, Expr]]:
        yield from self.tensors.items()

    def under(self, op: WeightOp) -> Factors:
        raise Unsupported(f"{self.algorithm} under {type(op).__name__}")

    def delta(self, base: Any = None) -> Any:
        raise Unsupported(f"the change of a {self.algorithm} module")
