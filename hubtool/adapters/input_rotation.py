"""InputRotation: PEFT's OFT and BOFT, which rotate the inputs (columns) of W; the change needs the base weight.

``oft_R`` (blocks, n(n-1)/2): the upper triangle of each skew-symmetric Q, row by row; one block may serve all. R is the Cayley transform by
Neumann series, ``terms`` long (5, PEFT's default; the number lives in adapter_config.json only), or exact; W' = W blockdiag(R)^T.
``scaled_oft`` (OneTrainer): Q divided by 2 sqrt(n - 1). ``dora_scale`` (DoRA-OFT, OneTrainer): rows times dora_scale / ``initial_norm``, or
/ ||W||. ``boft_R`` (stages, blocks, n, n) with ``boft_s`` (rows): butterfly stages, then rows scaled.
Sources: PEFT 0.21 tuners/oft and tuners/boft; Qiu et al. 2025 (arXiv 2506.19847); OneTrainer's adapters as InvokeAI reads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hubtool.adapters import parts
from hubtool.adapters.parts import Defaults, Windows, require
from hubtool.adapters.rotation import cayley, skew
from hubtool.adapters.weight_ops import ReshapeWeight, SwapHalves, TakeCols, TakeRows, Transpose, WeightOp
from hubtool.errors import ShapeMismatch, Unsupported
from hubtool.tensors import expr as e
from hubtool.tensors.dtypes import numel
from hubtool.tensors.expr import Expr

ROLES = ("alpha", "oft_R", "scaled_oft", "dora_scale", "initial_norm", "boft_R", "boft_s")


@dataclass(frozen=True, slots=True)
class InputRotation(Defaults):
    """One module's rotation of inputs. ``terms``: length of the Neumann series, None for the exact transform. ``alpha`` means nothing."""

    oft_R: Expr | None = None  # noqa: N815 (PEFT's own name)
    scaled_oft: Expr | None = None
    boft_R: Expr | None = None  # noqa: N815
    boft_s: Expr | None = None
    dora_scale: Expr | None = None
    initial_norm: Expr | None = None
    alpha: Expr | None = None
    alpha_value: float | None = None
    terms: int | None = 5

    @property
    def algorithm(self) -> str:
        return "oft" if self.oft_R is not None else "boft"

    @property
    def block_size(self) -> int:
        if self.boft_R is not None:
            return self.boft_R.shape[-1]
        assert self.oft_R is not None
        return (1 + math.isqrt(1 + 8 * self.oft_R.shape[1])) // 2

    @property
    def rank(self) -> int:
        """The number of blocks, PEFT's r."""
        blocks = self.oft_R if self.oft_R is not None else self.boft_R
        assert blocks is not None
        return blocks.shape[0] if self.oft_R is not None else blocks.shape[1]

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """(out, in * kh * kw): rows where something scales them, inputs unless one block serves all."""
        rows = next((t for t in (self.boft_s, self.dora_scale, self.initial_norm) if t is not None), None)
        shared = self.oft_R is not None and self.rank == 1
        return (None if rows is None else numel(rows.shape)), (None if shared else self.rank * self.block_size)

    def roles(self) -> Iterator[tuple[str, Expr]]:
        return parts.roles(self, ROLES)

    def check(self, name: str) -> None:
        """Raise ``CorruptFile`` for blocks that are no triangles or squares. ``name`` is the module, for the message."""
        require((self.oft_R is None) != (self.boft_R is None), f"{name}: a rotation has one set of blocks")
        require((self.boft_R is None) == (self.boft_s is None), f"{name}: boft_R and boft_s come together")
        if self.oft_R is not None:
            shape = self.oft_R.shape
            triangle = len(shape) == 2 and min(shape) > 0
            size = self.block_size if triangle else 0
            require(
                triangle and size * (size - 1) == 2 * shape[1], f"{name}: oft_R of shape {shape} holds no triangles"
            )
        if self.boft_R is not None:
            shape = self.boft_R.shape
            square = len(shape) == 4 and shape[-1] == shape[-2] and min(shape) > 0
            require(square and _stages_fit(shape), f"{name}: boft_R of shape {shape}")
        for vector in (self.dora_scale, self.initial_norm):
            require(vector is None or numel(vector.shape) == self.sizes[0], f"{name}: magnitudes of different lengths")

    def under(self, op: WeightOp) -> InputRotation:
        """Rows are rotated alike, so only what scales them is cut; inputs can be cut where blocks end."""
        match op:
            case TakeRows() | SwapHalves():
                return self if self.sizes[0] is None else self._rows(parts.windows(op, self.sizes[0]))
            case TakeCols(start, stop):
                return self._cols(start, stop)
            case Transpose():
                raise Unsupported("transposing a rotation of inputs: it would rotate rows")
            case ReshapeWeight(shape):
                if self.sizes[1] not in (None, numel(shape[1:])):
                    raise Unsupported(f"reshaping to {shape} a weight whose {self.sizes[1]} inputs are rotated")
                return self

    def _rows(self, pieces: Windows) -> InputRotation:
        rows = self.sizes[0] or 0
        cut = {
            role: parts.pick(e.reshape(tensor, (rows, *(1,) * (len(tensor.shape) - 1))), pieces)
            for role in ("boft_s", "dora_scale", "initial_norm")
            if (tensor := getattr(self, role)) is not None
        }
        return replace(self, **cut)  # type: ignore[arg-type]

    def _cols(self, start: int, stop: int) -> InputRotation:
        if self.dora_scale is not None and self.initial_norm is None:
            raise Unsupported("taking columns under a DoRA magnitude: its norm spans them")
        if self.sizes[1] is None:
            raise Unsupported("taking columns under a rotation whose one block serves all: their number is unknown")
        pieces = parts.coarse(parts.window(start, stop, self.sizes[1], "columns"), self.block_size)
        if pieces is None or (self.boft_R is not None and self.boft_R.shape[0] > 1):
            raise Unsupported(f"cutting inputs that a rotation mixes: its blocks have {self.block_size}")
        if self.oft_R is not None:
            return replace(self, oft_R=parts.pick(self.oft_R, pieces))
        return replace(self, boft_R=parts.pick(self.boft_R, pieces, 1))  # type: ignore[arg-type]

    def delta(self, base: Any = None) -> Any:
        """The change of ``base`` in fp32, shaped as it."""
        weight = parts.needed(base, "a rotation")
        if self.scaled_oft is not None and weight.ndim > 2:
            raise Unsupported("scaled OFT of a convolution: trainers disagree about the direction of the rotation")
        columns = weight.flatten(1).T
        if self.sizes[1] not in (None, len(columns)) or len(columns) % self.block_size:
            raise ShapeMismatch(f"a rotation of {self.sizes[1]} inputs for a weight of shape {tuple(weight.shape)}")
        rotated = self._rotated(columns).T.reshape(weight.shape)
        return rotated * self._gain(weight) - weight

    def _rotated(self, columns: Any) -> Any:
        if self.boft_R is not None:
            return _butterfly(columns, cayley(-0.5 * skew(parts.number(self.boft_R))))
        assert self.oft_R is not None
        size = self.block_size
        q = _from_triangle(parts.number(self.oft_R), size)
        if self.scaled_oft is not None:
            q = q / (2 * math.sqrt(size - 1))
        rotations = cayley(-q) if self.terms is None else _neumann(q, self.terms)
        return (rotations @ columns.reshape(-1, size, columns.shape[1])).reshape(columns.shape)

    def _gain(self, weight: Any) -> Any:
        """What multiplies the rows after the rotation."""
        view = (-1,) + (1,) * (weight.ndim - 1)
        if self.boft_s is not None:
            return parts.number(self.boft_s).reshape(view)
        if self.dora_scale is None:
            return 1.0
        known = self.initial_norm
        norm = weight.flatten(1).norm(dim=1) if known is None else parts.number(known).flatten()
        return (parts.number(self.dora_scale).flatten() / norm).reshape(view)

    def bias_delta(self, base_bias: Any = None) -> Any | None:
        return None


def _stages_fit(shape: tuple[int, ...]) -> bool:
    stages, count, size, _ = shape
    return stages == 1 or (size % 2 == 0 and stages <= 48 and count % (1 << (stages - 1)) == 0)


def _from_triangle(upper: Any, size: int) -> Any:
    """Skew-symmetric matrices from their upper triangles."""
    import torch

    rows, columns = torch.triu_indices(size, size, 1)
    q = torch.zeros(len(upper), size, size, dtype=upper.dtype)
    q[:, rows, columns] = upper
    return skew(q)


def _neumann(q: Any, terms: int) -> Any:
    """I + 2Q + 2Q^2 + ... + Q^top, the last power counted once. PEFT's series has no shorter top than 3 but I and I + 2Q."""
    import torch

    top = terms - 1 if terms < 3 else max(terms - 1, 3)
    total = torch.eye(q.shape[-1], dtype=q.dtype).expand_as(q)
    power = q
    for i in range(1, top + 1):
        total = total + (1.0 if i == top > 1 else 2.0) * power
        power = power @ q
    return total


def _butterfly(columns: Any, stages: Any) -> Any:
    """PEFT's stages P B P^T: P takes, in each span of 2^i blocks, the even half blocks before the odd ones."""
    for i, rotations in enumerate(stages):
        half = rotations.shape[-1] // 2
        apart = columns if i == 0 else _regrouped(columns, (-1, 2, 1 << i, half))
        turned = (rotations @ apart.reshape(*rotations.shape[:2], -1)).reshape(columns.shape)
        columns = turned if i == 0 else _regrouped(turned, (-1, 1 << i, 2, half))
    return columns


def _regrouped(columns: Any, spans: tuple[int, ...]) -> Any:
    """The middle two of the four levels that dimension 0 is made of, exchanged."""
    return columns.unflatten(0, spans).transpose(1, 2).reshape(columns.shape)


PATCH = InputRotation
