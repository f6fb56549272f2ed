"""Kronecker: LoKr. delta = scale * kron(w1, w2), the columns of w2 running over in * kh * kw.

w1 = lokr_w1 or w1_a @ w1_b; w2 = lokr_w2 or w2_a @ w2_b, or by Tucker t2 (rank, rank, kh, kw), w2_a (rank, out_k), w2_b (rank, in_n).
scale = alpha / rank when either half is decomposed, else 1 whatever alpha says. Early files (March 2023) split a convolution's in * kh * kw
where newer ones split its inputs: ``kron(w1, w2.flatten(1)).reshape(W.shape)`` is right for both. Source: LyCORIS (arXiv 2309.14859).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from hubtool.adapters import parts
from hubtool.adapters.parts import Windows, require
from hubtool.adapters.two_halves import TwoHalves, check_pair, multiplied
from hubtool.errors import CorruptFile, Unsupported
from hubtool.tensors.dtypes import numel
from hubtool.tensors.expr import Expr
from hubtool.types import Shape


@dataclass(frozen=True, slots=True)
class Kronecker(TwoHalves):
    """One module's LoKr change. ``shape``: the weight's shape where it is known (decomposed factors flatten a convolution)."""

    ROLES: ClassVar[tuple[str, ...]] = (
        "alpha", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "dora_scale", "diff_b",
    )  # fmt: skip

    lokr_w1: Expr | None = None
    lokr_w1_a: Expr | None = None
    lokr_w1_b: Expr | None = None
    lokr_w2: Expr | None = None
    lokr_w2_a: Expr | None = None
    lokr_w2_b: Expr | None = None
    lokr_t2: Expr | None = None
    alpha: Expr | None = None
    alpha_value: float | None = None
    dora_scale: Expr | None = None
    diff_b: Expr | None = None
    shape: Shape | None = None

    @property
    def algorithm(self) -> str:
        return "lokr"

    @property
    def rank(self) -> int | None:
        """The rank of the decomposed half; None for full matrices."""
        inner = self.lokr_w2_b if self.lokr_w2_b is not None else self.lokr_w1_b
        return None if inner is None else inner.shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha_value is None or self.rank is None else self.alpha_value / self.rank

    @property
    def first(self) -> tuple[int, int]:
        """Rows and columns of w1."""
        a, b = (self.lokr_w1, self.lokr_w1) if self.lokr_w1 is not None else (self.lokr_w1_a, self.lokr_w1_b)
        assert a is not None
        assert b is not None
        return a.shape[0], b.shape[1]

    @property
    def second(self) -> Shape:
        """Shape of w2: two dimensions, or a kernel behind them where the factors have one."""
        if self.lokr_w2 is not None:
            return self.lokr_w2.shape
        assert self.lokr_w2_a is not None
        assert self.lokr_w2_b is not None
        if self.lokr_t2 is not None:
            return (self.lokr_w2_a.shape[1], self.lokr_w2_b.shape[1], *self.lokr_t2.shape[2:])
        return (self.lokr_w2_a.shape[0], *self.lokr_w2_b.shape[1:])

    @property
    def sizes(self) -> tuple[int, int]:
        """(out, in * kh * kw)."""
        return self.first[0] * self.second[0], self.first[1] * numel(self.second[1:])

    @property
    def own_shape(self) -> Shape:
        return (self.sizes[0], self.first[1] * self.second[1], *self.second[2:])

    @property
    def convolves(self) -> bool:
        return len(self.second) != 2 or self.lokr_t2 is not None

    def check_halves(self, name: str) -> None:
        _check_half(name, self.lokr_w1, self.lokr_w1_a, self.lokr_w1_b, None)
        _check_half(name, self.lokr_w2, self.lokr_w2_a, self.lokr_w2_b, self.lokr_t2)
        w1 = self.lokr_w1 if self.lokr_w1 is not None else self.lokr_w1_b
        require(w1 is not None and len(w1.shape) == 2, f"{name}: the first half of a LoKr is a matrix")

    def row_cut(self, pieces: Windows) -> dict[str, Any]:
        """Rows of W are rows of w1 times rows of w2, so cuts fall on the borders between w1's rows, or all inside one of them."""
        block = self.second[0]
        borders = parts.coarse(pieces, block)
        if borders is not None:
            return self._first_rows(borders)
        row = pieces[0][0] // block
        if any(start // block != row or (stop - 1) // block != row for start, stop in pieces):
            raise Unsupported(
                f"cutting a LoKr between the borders of its blocks of {block} rows (--as lora expands it)"
            )
        inside = tuple((start - row * block, stop - row * block) for start, stop in pieces)
        a_axis = 1 if self.lokr_t2 is not None else 0
        second = {
            "lokr_w2": parts.pick_optional(self.lokr_w2, inside),
            "lokr_w2_a": None if self.lokr_w2_a is None else parts.pick(self.lokr_w2_a, inside, a_axis),
        }
        return self._first_rows(((row, row + 1),)) | second

    def _first_rows(self, pieces: Windows) -> dict[str, Any]:
        return {role: parts.pick_optional(getattr(self, role), pieces) for role in ("lokr_w1", "lokr_w1_a")}

    def column_cut(self, start: int, stop: int) -> dict[str, Any]:
        """Columns of W are those of w1 times those of w2: cuts fall on the borders between w1's columns."""
        shape = self.weight_shape
        (piece,) = parts.window(start, stop, shape[1], "columns")
        step, block = numel(shape[2:]), numel(self.second[1:])
        borders = parts.coarse(((piece[0] * step, piece[1] * step),), block)
        if borders is None:
            raise Unsupported(f"cutting a LoKr between the borders of its blocks of {block} columns")
        tensors = {role: getattr(self, role) for role in ("lokr_w1", "lokr_w1_b")}
        return {role: None if tensor is None else parts.pick(tensor, borders, 1) for role, tensor in tensors.items()}

    def turned(self) -> dict[str, Any]:
        exchanged = {"lokr_w1": "lokr_w1", "lokr_w1_a": "lokr_w1_b", "lokr_w1_b": "lokr_w1_a"}
        exchanged |= {role.replace("1", "2"): source.replace("1", "2") for role, source in exchanged.items()}
        tensors = {role: getattr(self, source) for role, source in exchanged.items()}
        return {role: None if tensor is None else parts.transpose(tensor) for role, tensor in tensors.items()}

    def product(self) -> Any:
        first = _whole(self.lokr_w1, self.lokr_w1_a, self.lokr_w1_b, None)
        second = _whole(self.lokr_w2, self.lokr_w2_a, self.lokr_w2_b, self.lokr_t2)
        return self.scale * parts.kron(first, second)


def _check_half(name: str, whole: Expr | None, a: Expr | None, b: Expr | None, core: Expr | None) -> None:
    if whole is not None:
        fits = len(whole.shape) >= 2 and numel(whole.shape) > 0 and a is None and b is None and core is None
        require(fits, f"{name}: a LoKr half {whole.shape} is no matrix, or comes twice")
        return
    if a is None or b is None:
        raise CorruptFile(f"{name}: half of a LoKr is missing")
    check_pair("LoKr", name, a, b, core)


def _whole(whole: Expr | None, a: Expr | None, b: Expr | None, core: Expr | None) -> Any:
    """A half as a matrix in fp32, its kernel flattened into the columns."""
    if whole is not None:
        return parts.matrix(whole)
    assert a is not None
    assert b is not None
    return multiplied(a, b, core)


PATCH = Kronecker
