"""Hadamard: LoHa. delta = alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), element by element.

Plain: a (out, rank), b (rank, in * kh * kw). Tucker: t (rank, rank, kh, kw), a (rank, out), b (rank, in); each half is then
sum_ij t[i,j,...] a[i,out] b[j,in]. Source: Hyeon-Woo et al. 2021 (arXiv 2108.06098); LyCORIS (arXiv 2309.14859).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from hubtool.adapters import parts
from hubtool.adapters.parts import Windows, require
from hubtool.adapters.two_halves import TwoHalves, check_pair, multiplied
from hubtool.errors import Unsupported
from hubtool.tensors.dtypes import numel
from hubtool.tensors.expr import Expr
from hubtool.types import Shape


@dataclass(frozen=True, slots=True)
class Hadamard(TwoHalves):
    """One module's LoHa change. ``shape``: the weight's shape where it is known; plain factors show a convolution as (out, in * kh * kw)."""

    ROLES: ClassVar[tuple[str, ...]] = (
        "alpha", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "dora_scale", "diff_b",
    )  # fmt: skip

    hada_w1_a: Expr
    hada_w1_b: Expr
    hada_w2_a: Expr
    hada_w2_b: Expr
    hada_t1: Expr | None = None
    hada_t2: Expr | None = None
    alpha: Expr | None = None
    alpha_value: float | None = None
    dora_scale: Expr | None = None
    diff_b: Expr | None = None
    shape: Shape | None = None

    @property
    def algorithm(self) -> str:
        return "loha"

    @property
    def rank(self) -> int:
        return self.hada_w1_b.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank; a missing alpha means alpha = rank."""
        return 1.0 if self.alpha_value is None else self.alpha_value / self.rank

    @property
    def tucker(self) -> bool:
        return self.hada_t1 is not None

    @property
    def convolves(self) -> bool:
        return self.tucker

    @property
    def sizes(self) -> tuple[int, int]:
        if self.hada_t1 is not None:
            return self.hada_w1_a.shape[1], self.hada_w1_b.shape[1] * numel(self.hada_t1.shape[2:])
        return self.hada_w1_a.shape[0], numel(self.hada_w1_b.shape[1:])

    @property
    def own_shape(self) -> Shape:
        if self.hada_t1 is not None:
            return (self.hada_w1_a.shape[1], self.hada_w1_b.shape[1], *self.hada_t1.shape[2:])
        return self.sizes

    def check_halves(self, name: str) -> None:
        require((self.hada_t1 is None) == (self.hada_t2 is None), f"{name}: hada_t1 and hada_t2 come together")
        halves = (self.hada_w1_a, self.hada_w1_b, self.hada_t1), (self.hada_w2_a, self.hada_w2_b, self.hada_t2)
        sizes = [_half_sizes(name, *half) for half in halves]
        require(sizes[0] == sizes[1], f"{name}: the halves of a LoHa have the shapes {sizes[0]} and {sizes[1]}")

    def row_cut(self, pieces: Windows) -> dict[str, Any]:
        """Rows touch the a factors only."""
        axis = 1 if self.tucker else 0
        return {role: parts.pick(getattr(self, role), pieces, axis) for role in ("hada_w1_a", "hada_w2_a")}

    def column_cut(self, start: int, stop: int) -> dict[str, Any]:
        """Columns touch the b factors only."""
        shape = self.weight_shape
        if self.tucker and shape[1] != self.hada_w1_b.shape[1]:
            raise Unsupported(f"taking columns of Tucker factors under the shape {shape}")
        (piece,) = parts.window(start, stop, shape[1], "columns")
        step = 1 if self.tucker else numel(shape[2:])
        pieces = ((piece[0] * step, piece[1] * step),)
        return {role: parts.pick(getattr(self, role), pieces, 1) for role in ("hada_w1_b", "hada_w2_b")}

    def turned(self) -> dict[str, Any]:
        exchanged = {
            "hada_w1_a": "hada_w1_b",
            "hada_w1_b": "hada_w1_a",
            "hada_w2_a": "hada_w2_b",
            "hada_w2_b": "hada_w2_a",
        }
        return {role: parts.transpose(getattr(self, source)) for role, source in exchanged.items()}

    def product(self) -> Any:
        first = multiplied(self.hada_w1_a, self.hada_w1_b, self.hada_t1)
        return self.scale * first * multiplied(self.hada_w2_a, self.hada_w2_b, self.hada_t2)


def _half_sizes(name: str, a: Expr, b: Expr, core: Expr | None) -> tuple[int, ...]:
    check_pair("LoHa", name, a, b, core)
    return (a.shape[0], numel(b.shape[1:])) if core is None else (a.shape[1], b.shape[1], *core.shape[2:])


PATCH = Hadamard
