"""What a stored tensor becomes: itself plus the changes of all adapters, summed in fp32 and rounded once.

Low-rank and dense changes are added tile by tile, without ever forming a change as a whole; other kinds give theirs some rows at a time
where they can be cut, and as a whole where they cannot (a norm or a rotation that spans all rows). Formulas: ``Patch.delta`` of each kind; the strength multiplies it, so
that strength 1 is the adapter and 0 the base. A replaced weight (``set``) is what it is at any strength.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hubtool.adapters.dense import Dense
from hubtool.adapters.ir import Patch
from hubtool.adapters.kronecker import Kronecker
from hubtool.adapters.low_rank import LowRank
from hubtool.adapters.parts import matrix, number
from hubtool.adapters.promote import to_lora
from hubtool.adapters.rotation import Rotation
from hubtool.adapters.weight_ops import TakeRows
from hubtool.errors import BadValues, HubtoolError, Unsupported
from hubtool.ops.collapse.base import Windows
from hubtool.tensors.dtypes import numel
from hubtool.tensors.evaluate import is_finite
from hubtool.tensors.expr import Compute, Expr, Read
from hubtool.tensors.ref import TensorRef
from hubtool.types import Shape

_CHEAP = 32  # the rank up to which a Kronecker product is added as two factors
_TILE = 1 << 20  # elements of a change that is computed at once, where its kind can be cut
_ROUNDS = 200
# relative size of a step at which an inversion has arrived, and below which it may stall for rounding
_SETTLED, _NOISE = 1e-8, 1e-5


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """One adapter's change of one parameter. ``windows``: the parameter's rows in the stored tensor; ``shape``: its canonical shape.

    ``rows``: which rows of the patch's own change count (a fused patch for a base in parts); ``bias``: the change is that of the bias.
    """

    label: str
    patch: Patch
    strength: float
    windows: Windows
    shape: Shape
    transposed: bool = False
    bias: bool = False
    rows: tuple[int, int] | None = None

    @property
    def replaces(self) -> bool:
        return self.patch.algorithm == "set" and not self.bias

    @property
    def plain(self) -> bool:
        """Whether the parameter lies in one piece, as it is."""
        return len(self.windows) == 1 and not self.transposed and bool(self.shape)

    @property
    def dense(self) -> Expr | None:
        """The tensor that is added as it is, where there is one that lies like the stored tensor."""
        plain = isinstance(self.patch, Dense) and not self.bias and self.rows is None and not self.transposed
        if not plain or self.replaces or len(self.windows) > 1 or self.windows[0][0]:
            return None
        assert isinstance(self.patch, Dense)
        return self.patch.weight

    @property
    def factors(self) -> LowRank | None:
        """The patch as two factors whose product alone is the change; small Kronecker products too, since that is cheaper."""
        patch = self.patch
        plain = isinstance(patch, LowRank | Kronecker) and not self.bias and self.rows is None and not self.transposed
        if not plain or patch.needs_base or getattr(patch, "residual", None) is not None:
            return None
        try:
            made = to_lora(patch, self.shape)
        except Unsupported:
            return None
        return made if isinstance(patch, LowRank) or made.rank <= _CHEAP else None

    def changes(self, weight: Any) -> Iterator[tuple[int, int, Any]]:
        """(first row, last row, change at strength 1) of the parameter ``weight`` (fp32), some rows at a time where the kind allows it."""
        step = self.step
        if step is None:
            yield 0, weight.shape[0], self._checked(self.patch, weight)
            return
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            yield start, stop, self._checked(self.patch.under(TakeRows(start, stop)), weight[start:stop])

    @property
    def step(self) -> int | None:
        """How many rows of the change are computed at once; None for all."""
        if self.bias or self.rows is not None or len(self.shape) < 2:
            return None
        grain = _grain(self.patch)
        step = max(_TILE // max(numel(self.shape[1:]), 1) // grain, 1) * grain
        try:
            for start in range(0, self.shape[0], step):
                self.patch.under(TakeRows(start, min(start + step, self.shape[0])))
        except Unsupported:
            return None
        return step

    def _checked(self, patch: Patch, weight: Any) -> Any:
        try:
            change = self._change(patch, weight)
        except HubtoolError as error:
            error.message = f"{self.label}: {error.message}"
            raise
        if change is not None and not is_finite(change):
            raise BadValues(f"{self.label} holds NaN or infinity, or makes it")
        return change

    def _change(self, patch: Patch, weight: Any) -> Any:
        if self.bias:
            return patch.bias_delta(weight)
        if self.rows is not None:
            return patch.delta()[self.rows[0] : self.rows[1]]
        return patch.delta(weight)

    def replacement(self) -> Any:
        """The weight that takes the place of the old one, in fp32."""
        assert isinstance(self.patch, Dense)
        assert self.patch.set_weight is not None
        value = number(self.patch.set_weight)
        return (value if self.rows is None else value[self.rows[0] : self.rows[1]]).reshape(self.shape)


def _grain(patch: Patch) -> int:
    """Rows that a kind keeps together: those of the second factor of a Kronecker product, those of a rotation's block."""
    match patch:
        case Kronecker():
            return max(patch.second[0], 1)
        case Rotation():
            return patch.block_size
    return 1


def changed(ref: TensorRef, shares: Sequence[Share], *, inverse: bool = False) -> Expr:
    """The stored tensor with all changes; ``inverse``: without them, when it is the result of adding them."""
    if inverse:
        shares = tuple(_taken_back(share) for share in shares)
        if any(_depends(share) for share in shares):
            return Compute(_Undone(ref.name, tuple(shares)), (Read(ref),), ref.shape, ref.dtype)
        shares = tuple(replace(share, strength=-share.strength) for share in shares)
    streamed = [share for share in shares if share.dense is not None and share.dense.shape == ref.shape]
    factored = [share for share in shares if share not in streamed and share.factors is not None]
    if len(streamed) + len(factored) < len(shares):
        return Compute(_Whole(tuple(shares)), (Read(ref),), ref.shape, ref.dtype)
    sources = tuple(share.dense for share in streamed if share.dense is not None)
    function = _Tiled(tuple(share.strength for share in streamed), tuple(factored))
    return Compute(function, (Read(ref), *sources), ref.shape, ref.dtype)


def _depends(share: Share) -> bool:
    """Whether the change is computed from the old values. Of biases only IA3's is."""
    if share.replaces:
        return False
    return share.patch.algorithm == "ia3" if share.bias else share.patch.needs_base


def _taken_back(share: Share) -> Share:
    """The same change as something to invert. Raises ``Unsupported`` where the result does not tell what was there before."""
    if share.replaces:
        raise Unsupported(f"{share.label} replaced the weight: what was there before is gone")
    if share.patch.dora_scale is not None and not share.bias:
        raise Unsupported(f"{share.label} is a DoRA: it gave the rows new norms, and the old ones are gone")
    return share


@dataclass(frozen=True, slots=True, eq=False)
class _Tiled:
    """Stored rows + strengths * dense tensors + strengths * scale * up @ down, in tiles of rows."""

    strengths: tuple[float, ...]
    factored: tuple[Share, ...]
    rowwise = True
    positional = True
    finite = True

    def survey(self, tiles: Callable[[], Iterator[Any]]) -> list[tuple[Share, float, Any, Any]]:
        """The factors in fp32, read once for all tiles."""
        return [(share, *_factors(share)) for share in self.factored]

    def __call__(self, stored: Any, *dense: Any, start: int, state: list[tuple[Share, float, Any, Any]]) -> Any:
        width = numel(stored.shape[1:]) or 1
        flat = stored.reshape(stored.shape[0], width)
        for strength, tensor in zip(self.strengths, dense, strict=True):
            flat.add_(tensor.reshape(flat.shape), alpha=strength)
        for share, scale, up, down in state:
            _add_rows(flat, start // width, share, scale, up, down)
        return stored


def _factors(share: Share) -> tuple[float, Any, Any]:
    """(strength * scale, up as (out, rank), down as (rank, inputs)), finite."""
    patch = share.factors
    assert patch is not None
    up, down = matrix(patch.up), matrix(patch.down)
    for role, tensor in (("up", up), ("down", down)):
        if not is_finite(tensor):
            raise BadValues(f"{role} of {share.label} holds NaN or infinity")
    return share.strength * patch.scale, up, down


def _add_rows(flat: Any, first: int, share: Share, scale: float, up: Any, down: Any) -> None:
    """Add to the rows from ``first`` on what of a low-rank change falls on them."""
    offset, last = 0, first + flat.shape[0]
    for start, stop in share.windows:
        low, high = max(start, first), min(stop, last)
        if low < high:
            at = offset + low - start
            flat[low - first : high - first].addmm_(up[at : at + high - low].to(flat), down.to(flat), alpha=scale)
        offset += stop - start


@dataclass(frozen=True, slots=True, eq=False)
class _Whole:
    """The stored tensor as a whole plus every change; replaced rows first."""

    shares: tuple[Share, ...]
    finite = True

    def __call__(self, stored: Any) -> Any:
        needy = [share for share in self.shares if _depends(share)]
        replaced = [share for share in self.shares if share.replaces]
        others = [share for share in self.shares if share not in needy and share not in replaced]
        alone = len(needy) < 2 and not (
            needy and replaced
        )  # who needs the old weight comes first, and then nobody does
        result = stored if alone else stored.clone()
        for share in (*replaced, *needy, *others):
            _add(result, stored, share)
        return result


def _add(result: Any, stored: Any, share: Share) -> None:
    """Add one change, computed from what is stored, to ``result`` (which may be the same memory)."""
    if share.replaces:
        put(result, share, share.replacement())
        return
    weight, total = _seen(stored, share), _seen(result, share)
    for start, stop, change in share.changes(weight.cpu()):
        if change is not None:
            total[start:stop].add_(change.to(total.device).reshape(total[start:stop].shape), alpha=share.strength)
    if not share.plain:
        put(result, share, total)


def _seen(stored: Any, share: Share) -> Any:
    """The parameter inside the stored tensor: a view where it lies in one piece."""
    if not share.plain:
        return taken(stored, share)
    (start, stop), *_ = share.windows
    return stored[start:stop].reshape(share.shape)


@dataclass(frozen=True, slots=True, eq=False)
class _Undone:
    """The stored tensor before changes that depend on it: the fixed point of W = stored - sum of strength * change(W)."""

    name: str
    shares: tuple[Share, ...]
    finite = True

    def __call__(self, stored: Any) -> Any:
        forward, guess, least = _Whole(self.shares), stored.clone(), float("inf")
        size = float(stored.norm()) or 1.0
        for _ in range(_ROUNDS):
            step = stored - forward(guess.clone())
            moved = float(step.norm()) / size
            guess += step
            if moved <= _SETTLED or (moved <= _NOISE and moved > least / 2):
                return guess
            if not moved < 2 * least:
                break
            least = min(least, moved)
        raise Unsupported(f"{self.name}: this change is too strong to be taken back (error {least:.2g} of the weight)")


def taken(stored: Any, share: Share) -> Any:
    """The parameter out of the stored tensor."""
    import torch

    whole = stored.T if share.transposed else stored
    pieces = [whole[start:stop] for start, stop in share.windows]
    return torch.cat(pieces).reshape(share.shape)  # a copy, also of a single piece


def put(stored: Any, share: Share, value: Any) -> None:
    """The parameter back into its place."""
    whole, offset = (stored.T if share.transposed else stored), 0
    flat = value.reshape(share.shape[0], -1) if share.shape else value.reshape(1, 1)
    for start, stop in share.windows:
        target = whole[start:stop]
        target.copy_(flat[offset : offset + stop - start].reshape(target.shape))
        offset += stop - start
