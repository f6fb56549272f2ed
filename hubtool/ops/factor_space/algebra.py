"""The algebra of W = up @ down, up (m, R), down (R, n): bases by QR, everything else in an R x R core. Pure torch, fp32 in and out.

Nothing of size m x n is formed here, except by ``of_dense`` for changes that only exist as a whole matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_NOTHING = 1e-7  # of the largest singular value: less is rounding of the fp32 factors


@dataclass(frozen=True, slots=True)
class Decomposed:
    """The singular value decomposition of W, kept as it was found: left @ a = U S and b @ right = S V.

    ``left`` (m, p), ``a`` (p, k), ``values`` (k,) descending, ``b`` (k, q), ``right`` (q, n); a, values and b in fp64. ``energy``: squared
    norm of W, beyond ``values`` where those are not all.
    """

    left: Any
    a: Any
    values: Any
    b: Any
    right: Any
    energy: float

    def factors(self, rank: int) -> tuple[Any, Any]:
        """The best approximation of W at ``rank``, as up (m, rank) and down (rank, n) of equal norms; zeros beyond W's own rank."""
        import torch

        kept = min(rank, len(self.values))
        values = self.values[:kept]
        root = torch.where(values > _NOTHING * self.values[0], values.rsqrt(), 0.0)
        up = self.left @ (self.a[:, :kept] * root).to(self.left.dtype)
        down = (root.unsqueeze(1) * self.b[:kept]).to(self.right.dtype) @ self.right
        if kept == rank:
            return up, down
        return torch.nn.functional.pad(up, (0, rank - kept)), torch.nn.functional.pad(down, (0, 0, 0, rank - kept))

    def lost(self, rank: int) -> float:
        """Squared norm of what ``factors(rank)`` leaves out."""
        return max(float(self.values[rank:].square().sum()) + self.energy - float(self.values.square().sum()), 0.0)


@dataclass(frozen=True, slots=True)
class Bases:
    """Orthonormal bases of all changes of a module: W_i = left @ cores[i] @ right. ``left`` (m, p), ``right`` (q, n), cores in fp64."""

    left: Any
    right: Any
    cores: tuple[Any, ...]


def stacked(terms: Sequence[tuple[Any, Any, float]]) -> tuple[Any, Any]:
    """The sum of coefficient * up @ down as one pair of factors."""
    import torch

    ups = [up.flatten(1) if factor == 1.0 else up.flatten(1) * factor for up, _, factor in terms]
    downs = [down.flatten(1) for _, down, _ in terms]
    return (ups[0], downs[0]) if len(terms) == 1 else (torch.cat(ups, 1), torch.cat(downs, 0))


def of_factors(up: Any, down: Any) -> Decomposed:
    """The decomposition of up @ down; exact.

    With up = Q R and down = L P only the triangles are needed: R L = u S v gives U S = W V = up (L v), and S V = (u R) down.
    """
    import torch

    upper, lower = _triangles(up, down)
    u, values, v = torch.linalg.svd(upper @ lower, full_matrices=False)
    return Decomposed(up, lower @ v.T, values, u.T @ upper, down, float(values.square().sum()))


def _triangles(up: Any, down: Any) -> tuple[Any, Any]:
    import torch

    upper = torch.linalg.qr(up, mode="r").R.double()
    return upper, torch.linalg.qr(down.T, mode="r").R.double().T


def of_core(left: Any, core: Any, right: Any) -> Decomposed:
    """The decomposition of left @ core @ right, for orthonormal left and right."""
    import torch

    u, values, v = torch.linalg.svd(core.double(), full_matrices=False)
    return Decomposed(left, u * values, values, values.unsqueeze(1) * v, right, float(values.square().sum()))


def spectrum(up: Any, down: Any) -> list[float]:
    """The singular values of up @ down, descending; at most as many as up has columns."""
    import torch

    upper, lower = _triangles(up, down)
    values: list[float] = torch.linalg.svdvals(upper @ lower).tolist()
    return values


def bases(terms: Sequence[tuple[Any, Any, float]]) -> Bases:
    """Common bases of coefficient * up @ down of every term, and each term between them (the core space of arXiv 2509.17786).

    The bases are the singular vectors of the factors side by side, whatever the order of the terms. Inner products, norms and singular
    values of the cores are those of the changes themselves.
    """
    import torch

    left, upper = _basis(torch.cat([up.flatten(1) for up, _, _ in terms], 1))
    right, lower = _basis(torch.cat([down.flatten(1) for _, down, _ in terms], 0).T)
    cores, at = [], 0
    for up, _, factor in terms:
        own = slice(at, at + up.shape[1])
        cores.append(factor * (upper[:, own] @ lower[:, own].T))
        at = own.stop
    return Bases(left, right.T, tuple(cores))


def _basis(columns: Any) -> tuple[Any, Any]:
    """(left singular vectors of a tall matrix, its columns in their terms, in fp64)."""
    import torch

    found, triangle = torch.linalg.qr(columns)
    turned, values, v = torch.linalg.svd(triangle.double(), full_matrices=False)
    return found @ turned.to(found.dtype), values.unsqueeze(1) * v


def aligned(found: Bases) -> tuple[Any, tuple[Any, ...]]:
    """(U S (m, k), the parts V_i (k, n) of every term) of the concatenated changes [W_1 W_2 ...] = U S [V_1 V_2 ...]: KnOTS, arXiv 2410.19735."""
    import torch

    u, values, v = torch.linalg.svd(torch.cat(found.cores, 1), full_matrices=False)
    kept = values >= _NOTHING * values[0]
    left = found.left @ (u * values)[:, kept].to(found.left.dtype)
    parts = v[kept].to(found.right.dtype).split(found.right.shape[0], 1)
    return left, tuple(part @ found.right for part in parts)


def of_dense(change: Any, rank: int, seed: int = 0) -> Decomposed:
    """The ``rank`` largest singular triples of a matrix (m, n), by products with it; its error is at most 1.005 of the optimum's."""
    import torch

    from hubtool.ops.randomised_svd import truncated_svd

    found = truncated_svd(change, rank, seed=seed)
    values = found.values.double()
    return Decomposed(found.left, torch.diag(values), values, torch.diag(values), found.right, found.energy)


def product_norm(up: Any, down: Any) -> float:
    """Squared norm of up @ down, without forming it."""
    return float(((up.T @ up).double() * (down @ down.T).double()).sum().clamp_min(0))


def rounding(up: Any, down: Any, dtype: Any) -> float:
    """Squared norm of what storing both factors in ``dtype`` changes in their product."""
    import torch

    stored_up, stored_down = up.to(dtype).to(up.dtype), down.to(dtype).to(down.dtype)
    return product_norm(torch.cat([stored_up - up, up], 1), torch.cat([stored_down, stored_down - down], 0))


def inner_products(terms: Sequence[tuple[Any, Any, float]]) -> list[list[float]]:
    """The inner products of the changes coefficient * up @ down of all terms, by products of thin matrices."""
    flat = [(up.flatten(1), down.flatten(1), factor) for up, down, factor in terms]
    rows = [[0.0] * len(flat) for _ in flat]
    for i, (up, down, factor) in enumerate(flat):
        for j, (other_up, other_down, other) in enumerate(flat[: i + 1]):
            shared = (up.T @ other_up).double() * (down @ other_down.T).double()
            rows[i][j] = rows[j][i] = factor * other * float(shared.sum())
    return rows
