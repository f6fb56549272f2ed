"""Rotation: OFT and BOFT on the rows of W; the change needs the base weight.

OFT: Q = B - B^T for each block, R = (I + Q)(I - Q)^-1, and a block of rows becomes R^T W. BOFT: m butterfly stages of such blocks, ndim 4;
stage i mixes rows within spans of 2^i blocks, by R. ``alpha`` is a constraint: the norm of all Q together is clamped to alpha * rows. They
differ on 0: LyCORIS (flavour ``lycoris``) means no constraint, sd-scripts (``kohya``) clamps to zero, which is the identity.
``rescale`` multiplies the rows afterwards. ``oft_r`` is PEFT up to 0.14: Q halved, R itself applied, rows padded to whole blocks, one block may serve all.
Sources: Qiu et al. 2023 (arXiv 2306.07280), Liu et al. 2023 (arXiv 2311.06243), LyCORIS, sd-scripts networks/oft.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from hubtool.adapters import parts
from hubtool.adapters.parts import Defaults, Windows, require
from hubtool.adapters.weight_ops import ReshapeWeight, SwapHalves, TakeCols, TakeRows, Transpose, WeightOp
from hubtool.errors import ShapeMismatch, Unsupported
from hubtool.tensors.dtypes import numel
from hubtool.tensors.expr import Expr

ROLES = ("alpha", "oft_blocks", "oft_diag", "oft_r", "rescale", "diff_b")
Flavour: TypeAlias = Literal["lycoris", "kohya"]
_TINY = 1e-8  # both trainers keep the norm this far from zero


@dataclass(frozen=True, slots=True)
class Rotation(Defaults):
    """One module's rotation of rows. Exactly one of ``oft_blocks``, ``oft_diag`` (early LyCORIS) and ``oft_r`` (early PEFT) is there."""

    oft_blocks: Expr | None = None
    oft_diag: Expr | None = None
    oft_r: Expr | None = None
    rescale: Expr | None = None
    alpha: Expr | None = None
    alpha_value: float | None = None
    diff_b: Expr | None = None
    flavour: Flavour = "lycoris"

    @property
    def algorithm(self) -> str:
        return "boft" if self.butterfly else "oft"

    @property
    def blocks(self) -> Expr:
        tensor = next((t for t in (self.oft_blocks, self.oft_diag, self.oft_r) if t is not None), None)
        assert tensor is not None
        return tensor

    @property
    def butterfly(self) -> bool:
        return len(self.blocks.shape) == 4

    @property
    def block_size(self) -> int:
        return self.blocks.shape[-1]

    @property
    def rank(self) -> int:
        """What the trainer calls its dimension: the number of blocks for sd-scripts and PEFT, their size for LyCORIS."""
        return self.block_size if self.oft_r is None and self.flavour == "lycoris" else self.blocks.shape[-3]

    @property
    def constraint(self) -> float | None:
        """alpha where it limits the rotation; None where there is no limit, 0 where sd-scripts' limit leaves nothing."""
        if self.oft_blocks is None or self.alpha_value is None:
            return None
        return self.alpha_value if self.alpha_value > 0 or self.flavour == "kohya" else None

    @property
    def constrained(self) -> bool:
        """Whether the effect of a block depends on the norm of all of them."""
        return bool(self.constraint)

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """(out, None): rotations of rows know nothing about inputs."""
        return (None if self.oft_r is not None else self.blocks.shape[-3] * self.block_size), None

    def roles(self) -> Iterator[tuple[str, Expr]]:
        return parts.roles(self, ROLES)

    def check(self, name: str) -> None:
        """Raise ``CorruptFile`` unless there are square blocks, and a scale for each row. ``name`` is the module, for the message."""
        present = [t for t in (self.oft_blocks, self.oft_diag, self.oft_r) if t is not None]
        require(len(present) == 1, f"{name}: a rotation has one set of blocks")
        shape = self.blocks.shape
        square = len(shape) in (3, 4) and shape[-1] == shape[-2] and min(shape) > 0
        require(
            square and (len(shape) == 3 or self.oft_blocks is not None), f"{name}: rotation blocks of shape {shape}"
        )
        require(not self.butterfly or _stages_fit(shape), f"{name}: butterfly blocks of shape {shape}")
        rows = self.sizes[0]
        fits = self.rescale is None or rows is None or numel(self.rescale.shape) == rows
        require(fits, f"{name}: rescale does not have {rows} numbers")
        if rows is not None:
            parts.check_bias(name, rows, self.diff_b)

    def under(self, op: WeightOp) -> Rotation:
        """Rows can be cut and exchanged where blocks end; columns are rotated alike."""
        match op:
            case TakeRows() | SwapHalves():
                return self._rows(op)
            case TakeCols():
                return self
            case Transpose():
                raise Unsupported("transposing a rotation of rows: it would rotate columns")
            case ReshapeWeight(shape):
                if not shape or shape[0] != (self.sizes[0] or shape[0]):
                    raise Unsupported(f"reshaping to {shape} a weight whose {self.sizes[0]} rows are rotated")
                return self

    def _rows(self, op: TakeRows | SwapHalves) -> Rotation:
        rows, size = self.sizes[0], self.block_size
        if rows is None:
            raise Unsupported("cutting rows under PEFT's early OFT: its blocks need not end where the weight does")
        pieces = parts.windows(op, rows)
        span = size << (self.blocks.shape[0] - 1) if self.butterfly else size
        if parts.coarse(pieces, span) is None:
            raise Unsupported(f"cutting rows that a rotation mixes: its blocks have {span}, the cut is at {pieces[0]}")
        if self.constrained and isinstance(op, TakeRows) and pieces != ((0, rows),):
            raise Unsupported(f"cutting a rotation with a constraint (alpha {self.alpha_value:g}): it spans all blocks")
        return self._taken(pieces, tuple((start // size, stop // size) for start, stop in pieces))

    def _taken(self, pieces: Windows, blocks: Windows) -> Rotation:
        rescale, role = self.rescale, "oft_diag" if self.oft_diag is not None else "oft_blocks"
        if rescale is not None and rescale.shape[0] != self.sizes[0]:
            raise Unsupported(f"taking rows of a rescale of shape {rescale.shape}")
        return replace(
            self,
            **{role: parts.pick(self.blocks, blocks, 1 if self.butterfly else 0)},  # type: ignore[arg-type]
            rescale=parts.pick_optional(rescale, pieces),
            diff_b=parts.pick_optional(self.diff_b, pieces),
        )

    def delta(self, base: Any = None) -> Any:
        """The change of ``base`` in fp32, shaped as it."""
        weight = parts.needed(base, "a rotation")
        if self.sizes[0] not in (None, weight.shape[0]):
            raise ShapeMismatch(f"a rotation of {self.sizes[0]} rows for a weight of shape {tuple(weight.shape)}")
        rotated = self._rotated(weight.flatten(1)).reshape(weight.shape)
        if self.rescale is not None:
            rotated = rotated * parts.number(self.rescale).reshape(-1, *(1,) * (weight.ndim - 1))
        return rotated - weight

    def _rotated(self, weight: Any) -> Any:
        if self.oft_diag is not None:
            raise Unsupported(
                "early LyCORIS' oft_diag: readers disagree whether it holds the rotation or its generator"
            )
        if self.oft_r is not None:
            return _padded(weight, cayley(0.5 * skew(parts.number(self.oft_r))))
        rotations = cayley(self._clamped(skew(parts.number(self.blocks)), weight.shape[0]))
        return _butterfly(weight, rotations) if self.butterfly else by_blocks(weight, rotations.transpose(1, 2))

    def _clamped(self, q: Any, rows: int) -> Any:
        if self.constraint is None:
            return q
        norm, largest = float(q.norm()), self.constraint * rows
        if self.flavour == "kohya":
            return q * ((min(norm, largest) + _TINY) / (norm + _TINY))
        return q * (largest / (norm + _TINY)) if largest < norm + _TINY else q

    def bias_delta(self, base_bias: Any = None) -> Any | None:
        return parts.bias_sum((1.0, self.diff_b))


def skew(blocks: Any) -> Any:
    """B - B^T."""
    return blocks - blocks.transpose(-1, -2)


def cayley(q: Any) -> Any:
    """(I + Q)(I - Q)^-1, which is orthogonal for a skew-symmetric Q."""
    import torch

    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    return torch.linalg.solve(eye - q, eye + q, left=False)


def by_blocks(weight: Any, rotations: Any) -> Any:
    """Block i of the rows multiplied by ``rotations[i]`` from the left. ``weight``: (blocks * size, n)."""
    count, size, _ = rotations.shape
    return (rotations @ weight.reshape(count, size, -1)).reshape(weight.shape)


def _stages_fit(shape: tuple[int, ...]) -> bool:
    """An even block size, and spans of 2^i blocks that the weight is made of."""
    stages, count, size, _ = shape
    return size % 2 == 0 and stages <= 48 and count % (1 << (stages - 1)) == 0


def _butterfly(weight: Any, stages: Any) -> Any:
    """LyCORIS' stages: in stage i, rows j and j + k of each 2k = 2^i * size rows become neighbours before the blocks are applied."""
    half = stages.shape[-1] // 2
    for i, rotations in enumerate(stages):
        k = half << i
        paired = weight.unflatten(0, (-1, 2, k)).transpose(1, 2).reshape(weight.shape)
        weight = by_blocks(paired, rotations).unflatten(0, (-1, k, 2)).transpose(1, 2).reshape(weight.shape)
    return weight


def _padded(weight: Any, rotations: Any) -> Any:
    """Blocks over rows that they may exceed: what lies beyond the last row is cut off, as PEFT does."""
    import torch

    count, size, _ = rotations.shape
    needed = -(-weight.shape[0] // size)
    if count not in (1, needed):
        raise ShapeMismatch(f"a rotation of {count} blocks of {size} for a weight of {weight.shape[0]} rows")
    padding = torch.zeros(needed * size - weight.shape[0], weight.shape[1])
    whole = by_blocks(torch.cat([weight, padding]), rotations.expand(needed, size, size))
    return whole[: weight.shape[0]]


PATCH = Rotation
