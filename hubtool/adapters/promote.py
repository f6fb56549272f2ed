"""Promotion: kinds whose change is a product of two matrices, rewritten as ``LowRank`` without losing anything. The rank may grow.

Tucker -> LoCon: the core is folded into down, same rank. LoHa -> rank r^2: rows of up are face-splitting products of the a factors' rows,
rows of down products of the b factors' rows. LoKr: kron(A1 B1, A2 B2) = kron(A1, A2) kron(B1, B2), where a full half is I times itself or
itself times I, whichever is narrower. What one multiplication makes of two half-precision numbers is exact in fp32; factors that are only
copied keep their dtype. A LoHa whose r^2 exceeds the weight becomes W I or I W instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hubtool.adapters.hadamard import Hadamard
from hubtool.adapters.ir import Patch
from hubtool.adapters.kronecker import Kronecker
from hubtool.adapters.low_rank import LowRank
from hubtool.adapters.parts import kron
from hubtool.errors import Unsupported
from hubtool.tensors import expr as e
from hubtool.tensors.dtypes import numel
from hubtool.tensors.expr import Compute, Expr
from hubtool.types import Shape

_HINT = "extract finds the nearest low-rank form by SVD"
_REASONS = {
    "oft": "a rotation changes W by a product with W itself, which has no low-rank form without the base weight",
    "boft": "a rotation changes W by a product with W itself, which has no low-rank form without the base weight",
    "glora": "a GLoRA contains the base weight, and its change cannot be written without it",
    "ia3": "IA3 rescales the base weight, and its change cannot be written without it",
    "full": "a full difference has no exact low-rank form below its full rank",
    "norm": "a normalisation layer has no matrix to decompose",
    "set": "a replaced weight is no change to decompose",
    "sparse": "a sparse residual has no exact low-rank form below its full rank",
}


def to_lora(patch: Patch, shape: Shape | None = None) -> LowRank:
    """``patch`` as LoRA or LoCon with exactly its change; magnitude, bias and scale travel along.

    ``shape``: the base weight's, needed to tell a convolution from a linear layer where the factors flatten it. Raises ``Unsupported``
    with the reason for kinds that have no such form.
    """
    match patch:
        case LowRank():
            return _folded(patch)
        case Hadamard():
            return _from_hadamard(patch, shape or patch.weight_shape)
        case Kronecker():
            return _from_kronecker(patch, shape or patch.weight_shape)
    raise Unsupported(_REASONS.get(patch.algorithm, f"{patch.algorithm} has no low-rank form"), hint=_HINT)


def _folded(patch: LowRank) -> LowRank:
    if patch.mid is None:
        return patch
    rank = patch.mid.shape[0]
    down = Compute(_fold, (patch.mid, patch.down), (rank, patch.down.shape[1], *patch.kernel), "F32")
    up = e.reshape(patch.up, (patch.up.shape[0], rank, *(1,) * len(patch.kernel)))
    same = rank == patch.rank
    return replace(
        patch,
        up=up,
        down=down,
        mid=None,
        alpha=patch.alpha if same else None,
        alpha_value=patch.alpha_value if same else patch.scale * rank,
        rank_stabilised=patch.rank_stabilised and same,
    )


def _fold(mid: Any, down: Any) -> Any:
    import torch

    return torch.einsum("mn...,nj->mj...", mid, down.flatten(1))


@dataclass(frozen=True, slots=True)
class _Product:
    """A matrix as left @ right; a side that is None is the identity."""

    left: Expr | None
    right: Expr | None
    rows: int
    columns: int
    rank: int


def _from_kronecker(patch: Kronecker, shape: Shape) -> LowRank:
    first = _narrow(patch.lokr_w1, patch.lokr_w1_a, patch.lokr_w1_b)
    second = _narrow(patch.lokr_w2, *_untucked(patch.lokr_w2_a, patch.lokr_w2_b, patch.lokr_t2))
    up = _kron(first.left, second.left, (first.rows, first.rank), (second.rows, second.rank))
    down = _kron(first.right, second.right, (first.rank, first.columns), (second.rank, second.columns))
    return _finished(patch, up, down, shape)


def _narrow(whole: Expr | None, a: Expr | None, b: Expr | None) -> _Product:
    """The narrowest product that a half of a LoKr is."""
    if whole is not None:
        return _identity_times(whole)
    assert a is not None
    assert b is not None
    rows, rank, columns = a.shape[0], a.shape[1], numel(b.shape[1:])
    if rank <= min(rows, columns):
        return _Product(a, e.reshape(b, (rank, columns)), rows, columns, rank)
    return _identity_times(Compute(_matmul, (a, b), (rows, columns), "F32"))


def _identity_times(whole: Expr) -> _Product:
    rows, columns = whole.shape[0], numel(whole.shape[1:])
    flat = e.reshape(whole, (rows, columns))
    if rows <= columns:
        return _Product(None, flat, rows, columns, rows)
    return _Product(flat, None, rows, columns, columns)


def _untucked(a: Expr | None, b: Expr | None, core: Expr | None) -> tuple[Expr | None, Expr | None]:
    """Tucker factors a (r, out), b (s, in), core (r, s, kernel) as plain ones: (out, r) and (r, in * kernel)."""
    if a is None or b is None or core is None:
        return a, b
    shape = (a.shape[0], b.shape[1] * numel(core.shape[2:]))
    return e.Permute(a, (1, 0)), Compute(_core_times, (core, b), shape, "F32")


def _kron(first: Expr | None, second: Expr | None, size_1: tuple[int, int], size_2: tuple[int, int]) -> Expr:
    """kron of two matrices, either of which may be the identity. Copies keep their dtype, products are fp32."""
    shape = (size_1[0] * size_2[0], size_1[1] * size_2[1])
    if first is None or second is None:
        present = first if first is not None else second
        if present is None:
            return _eye(shape[0])
        size, before = (size_1[0], True) if first is None else (size_2[0], False)
        return Compute(_kron_eye, (present,), shape, present.dtype, (("before", before), ("size", size)))
    return Compute(kron, (first, second), shape, "F32")


def _eye(size: int) -> Expr:
    return Compute(_identity, (), (size, size), "F32", (("size", size),))


def _from_hadamard(patch: Hadamard, shape: Shape) -> LowRank:
    a1, b1 = _untucked(patch.hada_w1_a, patch.hada_w1_b, patch.hada_t1)
    a2, b2 = _untucked(patch.hada_w2_a, patch.hada_w2_b, patch.hada_t2)
    assert a1 is not None
    assert a2 is not None
    assert b1 is not None
    assert b2 is not None
    out, inner = patch.sizes
    rank = a1.shape[1] * a2.shape[1]
    if rank <= min(out, inner):
        faces = Compute(_faces, (a1, a2), (out, rank), "F32")
        return _finished(patch, faces, Compute(_columns, (b1, b2), (rank, inner), "F32"), shape)
    whole: Expr = Compute(_hadamard, (a1, b1, a2, b2), (out, inner), "F32")
    up, down = (_eye(out), whole) if out <= inner else (whole, _eye(inner))
    return _finished(patch, up, down, shape)


def _finished(patch: Hadamard | Kronecker, up: Expr, down: Expr, shape: Shape) -> LowRank:
    """The factors in the weight's number of dimensions, with the scale as an alpha and whatever accompanied the module."""
    out, inner = patch.sizes
    if not shape or shape[0] != out or numel(shape) != out * inner:
        raise Unsupported(f"a change of {out} x {inner} for a weight of shape {shape}")
    rank = up.shape[1]
    tail = tuple(shape[2:])
    return LowRank(
        up=e.reshape(up, (out, rank, *(1,) * len(tail))),
        down=e.reshape(down, (rank, *shape[1:])),
        alpha_value=None if patch.scale == 1.0 else patch.scale * rank,
        dora_scale=patch.dora_scale,
        diff_b=patch.diff_b,
    )


def _matmul(a: Any, b: Any) -> Any:
    return a @ b.flatten(1)


def _hadamard(a1: Any, b1: Any, a2: Any, b2: Any) -> Any:
    return (a1 @ b1.flatten(1)) * (a2 @ b2.flatten(1))


def _core_times(core: Any, b: Any) -> Any:
    import torch

    return torch.einsum("ij...,jr->ir...", core, b).flatten(1)


def _kron_eye(matrix: Any, *, before: bool, size: int) -> Any:
    import torch

    eye = torch.eye(size, dtype=matrix.dtype)
    return kron(eye, matrix) if before else kron(matrix, eye)


def _identity(*, size: int) -> Any:
    import torch

    return torch.eye(size)


def _faces(a1: Any, a2: Any) -> Any:
    """Row i: the outer product of row i of both, flattened."""
    return (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1)


def _columns(b1: Any, b2: Any) -> Any:
    """Every row of b1 times every row of b2, element by element."""
    return (b1.flatten(1).unsqueeze(1) * b2.flatten(1).unsqueeze(0)).flatten(0, 1)
