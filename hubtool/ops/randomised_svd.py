"""The best approximation of a matrix at a rank, found by a few products with thin random blocks and checked against its own convergence.

Block Golub-Kahan with full reorthogonalisation (Golub, Luk, Overton 1981; Musco and Musco 2015, arXiv 1504.05477): after every product with
the matrix the best rank-r approximation inside all directions seen so far is known from a small core, so the energy it captures is a
rising sequence. Its last steps tell how much is still to come; products go on until what is missing is within the tolerance.
Per product that beats power iteration, which forgets all directions but the last: 5 products reach 1.0005 of the optimum where 2 power
iterations (6 products of the same width) reach 1.0013 (rank 32, 64 strong directions in noise).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1.005  # ||A - out|| against the optimum's
_OVERSAMPLING, _COLUMNS = (
    8,
    16,
)  # a block is so much wider than the rank, rounded up: products of 40 and of 48 columns take the same time
_FEWEST_BLOCKS = 3  # a matrix without room for so many blocks is decomposed exactly
_MOST_PRODUCTS = 24
_SAFETY = 2.0  # the extrapolated rest is an estimate; measured to be too low by 1.7 at most
_NOISE = 3e-6  # of the energy: what fp32 products cannot tell from nothing
_COARSE = 0.02  # of the energy: a smaller remainder needs exact products
HALVES = range(
    1 << 19, 1 << 24
)  # elements: below, bf16 gains nothing; above, a copy takes more memory than it is worth


@dataclass(frozen=True, slots=True)
class Factors:
    """``left`` (m, r), ``values`` (r,) descending, ``right`` (r, n), so that left * values @ right approximates the matrix.

    ``energy``: the matrix's squared Frobenius norm. ``bound``: estimated ratio of the error to the optimum's (1 for an exact one).
    ``products``: products with the matrix; 0 for an exact decomposition.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    energy: float
    bound: float = 1.0
    products: int = 0

    @property
    def rest(self) -> float:
        """Squared error of the approximation; below about 3e-6 of the energy it is rounding noise."""
        return max(self.energy - float(self.values.double().square().sum()), 0.0)


def seed_of(seed: int, key: str) -> int:
    """A generator's seed from the user's and a tensor's name: results depend on no order of evaluation."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def energy_of(matrix: Tensor) -> float:
    """Squared Frobenius norm of (m, n): rows in fp32, their sum in fp64."""
    import torch

    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


def truncated_svd(
    matrix: Tensor,
    rank: int,
    *,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    energy: float | None = None,
    halves: Tensor | None = None,
) -> Factors:
    """The ``rank`` largest singular triples of an fp32 matrix (m, n), with ||A - out|| at most ``tolerance`` times the least possible.

    ``energy``: the matrix's squared norm, where it is known already. ``halves``: memory for m n bf16 numbers that may be used, for sizes within ``HALVES``. Exact
    where the matrix is small or the rank nearly full. Signs are settled, so equal input gives equal output.
    """
    rank = min(rank, *matrix.shape)
    width = -(-(rank + _OVERSAMPLING) // _COLUMNS) * _COLUMNS
    energy = energy_of(matrix) if energy is None else energy
    found = None
    if min(matrix.shape) >= _FEWEST_BLOCKS * width:
        search = _Search(rank, width, seed, tolerance, energy)
        found = _by_halves(matrix, search, halves) or _by_whole(matrix, search)
    return _signed(found or _exact(matrix, rank, energy))


def balanced(factors: Factors) -> tuple[Tensor, Tensor]:
    """(up, down), each with the square root of the singular values: both stay in the range of half precision."""
    root = factors.values.sqrt()
    return factors.left * root, root[:, None] * factors.right


def _exact(matrix: Tensor, rank: int, energy: float) -> Factors:
    import torch

    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return Factors(left[:, :rank], values[:rank], right[:rank], energy)


@dataclass(slots=True)
class _Basis:
    """Orthonormal columns, grown by blocks."""

    blocks: list[Any] = field(default_factory=list)

    def grow(self, product: Tensor) -> None:
        """Add what ``product`` has beyond the span; twice, since once leaves rounding errors as large as the remainder."""
        import torch

        block = torch.linalg.qr(self._without(product)).Q
        if self.blocks:
            block = torch.linalg.qr(self._without(block)).Q
        self.blocks.append(block)

    def _without(self, product: Tensor) -> Tensor:
        for block in self.blocks:
            product = product - block @ (block.T @ product)
        return product

    def combine(self, coefficients: Tensor) -> Tensor:
        width = self.blocks[0].shape[1]
        pieces = (block @ part for block, part in zip(self.blocks, coefficients.split(width), strict=True))
        total = next(pieces)
        for piece in pieces:
            total += piece
        return total


@dataclass(slots=True)
class _Run:
    """Bases of both sides, and the block-bidiagonal core left.T @ A @ right by blocks.

    ``matrix``: A as products take it, in fp32 or bf16; bases and core are fp32 either way.
    """

    matrix: Any
    left: _Basis = field(default_factory=_Basis)
    right: _Basis = field(default_factory=_Basis)
    core: dict[tuple[int, int], Any] = field(default_factory=dict)

    def step(self) -> None:
        """One product with the matrix, from whichever side is due."""
        i, j = len(self.left.blocks), len(self.right.blocks)
        if i > j:
            block = self.left.blocks[-1].to(self.matrix.dtype)
            product = (block.T @ self.matrix).T.float()  # a fifth faster than matrix.T @ block
            self.right.grow(product)
            self.core[i - 1, j] = product.T @ self.right.blocks[-1]
        else:
            product = (self.matrix @ self.right.blocks[-1].to(self.matrix.dtype)).float()
            self.left.grow(product)
            self.core[i, j - 1] = self.left.blocks[-1].T @ product

    @property
    def products(self) -> int:
        return len(self.left.blocks) + len(self.right.blocks)

    def small(self) -> Tensor:
        import torch

        width = self.left.blocks[0].shape[1]
        whole = torch.zeros(len(self.left.blocks) * width, len(self.right.blocks) * width, dtype=torch.float64)
        for (i, j), block in self.core.items():
            whole[i * width : (i + 1) * width, j * width : (j + 1) * width] = block
        return whole

    def factors(self, rank: int, energy: float, bound: float) -> Factors:
        """The best approximation inside the bases, where products were exact."""
        import torch

        left, values, right = torch.linalg.svd(self.small(), full_matrices=False)
        u, v = (part.to(self.matrix) for part in (left[:, :rank], right[:rank].T))
        return Factors(
            self.left.combine(u), values[:rank].to(self.matrix), self.right.combine(v).T, energy, bound, self.products
        )

    def outputs(self, rank: int) -> Tensor:
        """The best ``rank`` directions on the left."""
        import torch

        left = torch.linalg.svd(self.small(), full_matrices=False).U[:, :rank]
        return self.left.combine(left.to(self.left.blocks[0]))


@dataclass(frozen=True, slots=True)
class _Search:
    """What is looked for: an approximation at ``rank`` within ``tolerance``, by blocks of ``width`` columns."""

    rank: int
    width: int
    seed: int
    tolerance: float
    energy: float

    def run(self, matrix: Tensor, least: float = 0.0) -> tuple[_Run, float, float] | None:
        """(bases that hold it, its bound, its squared error). None where the bases grow as large as an exact decomposition without
        getting there, or the remainder falls below the share ``least`` of the energy."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        start = torch.randn(matrix.shape[1], self.width, generator=generator).to(matrix)
        run = _Run(matrix)
        run.left.grow((matrix @ start).float())
        captured: list[float] = []
        limit = min(matrix.shape) // self.width
        while run.products < _MOST_PRODUCTS and len(run.left.blocks) < limit:
            run.step()
            values = torch.linalg.svdvals(run.small())[: self.rank]
            captured.append(float(values.square().sum()))
            rest, bound = self.energy - captured[-1], _bound(self.energy, captured)
            if rest < least * self.energy:
                return None
            if bound <= self.tolerance:
                return run, bound, rest
        return None


def _by_whole(matrix: Tensor, search: _Search) -> Factors | None:
    found = search.run(matrix)
    return None if found is None else found[0].factors(search.rank, search.energy, found[1])


def _by_halves(matrix: Tensor, search: _Search, halves: Tensor | None) -> Factors | None:
    """Products with bf16 copies look for the directions, an exact one makes the factors of what they found.

    Only where the processor multiplies bf16 several times faster, and a remainder of some percent hides their noise of 2^-9.
    """
    import torch

    if matrix.numel() not in HALVES or matrix.device.type != "cpu" or not _fast_halves():
        return None
    held = torch.empty(matrix.shape, dtype=torch.bfloat16) if halves is None else halves[: matrix.numel()]
    found = search.run(held.view(matrix.shape).copy_(matrix), _COARSE)
    if found is None:
        return None
    run, bound, rest = found
    return _exactly(matrix, run, search.rank, search.energy, rest / bound**2)


def _fast_halves() -> bool:
    """Whether torch multiplies bf16 on this processor by its own instructions; the question has no public name yet."""
    import torch

    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(asked is not None and asked())


def _exactly(matrix: Tensor, run: _Run, rank: int, energy: float, optimum: float) -> Factors:
    """What the matrix itself has in the directions found. ``optimum``: the least squared error, as estimated."""
    import torch

    outputs = run.outputs(rank)
    right, upper = torch.linalg.qr((outputs.T @ matrix).T)
    u, values, v = torch.linalg.svd(upper.T.double())
    u, values, v = (part.to(matrix) for part in (u, values, v))
    rest = energy - float(values.double().square().sum())
    bound = max(rest / optimum, 1.0) ** 0.5
    return Factors(outputs @ u, values, v @ right.T, energy, bound, run.products + 1)


def _bound(energy: float, captured: list[float]) -> float:
    """Estimated ratio of the error to the optimum's, from the energy captured after each product.

    Gains alternate (the two sides see different things), so a gain is compared with the one before the last; their decay, continued,
    is what is still to come.
    """
    rest = energy - captured[-1]
    if rest <= _NOISE * energy:
        return 1.0
    if len(captured) < 4:
        return float("inf")
    gains = [b - a for a, b in zip(captured[-4:], captured[-3:], strict=False)]
    decay = gains[2] / gains[0] if gains[0] > 0 else 1.0
    if not 0 <= decay < 1:
        return float("inf")
    missing = _SAFETY * (gains[1] + gains[2]) * decay / (1 - decay)
    return float((rest / (rest - missing)) ** 0.5) if missing < rest else float("inf")


def _signed(found: Factors) -> Factors:
    """Every left vector's largest entry positive: a decomposition leaves the sign open."""
    import torch

    largest = found.left.gather(0, found.left.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(found.left)
    return Factors(found.left * sign, found.values, sign.T * found.right, found.energy, found.bound, found.products)
