"""Fusing: the patches of the parts of a fused weight (q, k, v ...) as one patch; the inverse of ``under(TakeRows(...))``.

Exact: what was split is joined again as it was, byte for byte, where the parts still share what splitting left whole; parts that never
were one become block-diagonal factors of the summed rank. What would need the base weight, or another kind, is ``Unsupported``.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from hubtool.adapters.dense import BIASES, WEIGHTS, Dense
from hubtool.adapters.glora import GLoRA
from hubtool.adapters.hadamard import Hadamard
from hubtool.adapters.input_rotation import InputRotation
from hubtool.adapters.ir import Patch
from hubtool.adapters.kronecker import Kronecker
from hubtool.adapters.low_rank import LowRank
from hubtool.adapters.promote import to_lora
from hubtool.adapters.rotation import Rotation
from hubtool.adapters.scaling import Scaling
from hubtool.errors import Unsupported
from hubtool.tensors import expr as e
from hubtool.tensors.dtypes import nbytes
from hubtool.tensors.evaluate import chunks
from hubtool.tensors.expr import Cast, Compute, Expr, Literal
from hubtool.types import Shape

_AS_LORA = "write it with --as lora"
P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Fused:
    """The patch of the fused weight. ``note`` says what had to be computed; None when every byte is the parts' own.

    ``rounded``: numbers were multiplied, not only placed.
    """

    patch: Patch
    note: str | None = None
    rounded: bool = False


def fuse(parts: Sequence[Patch | None], rows: Sequence[int]) -> Fused:
    """One patch for weights lying under one another: ``rows[i]`` rows each, ``None`` for a part that does not change.

    Its change is the parts' changes one below the other. Raises ``Unsupported`` with the reason.
    """
    present = [patch for patch in parts if patch is not None]
    if not present or len(parts) != len(rows):
        raise ValueError("nothing to fuse, or not as many sizes as parts")
    if len(parts) == 1:
        return Fused(present[0])
    kinds = {type(patch) for patch in present}
    join = _JOINS.get(kinds.pop())
    if kinds or join is None:
        names = ", ".join(sorted({patch.algorithm for patch in present}))
        raise Unsupported(f"the parts of one fused weight are {names}", hint=_AS_LORA)
    for patch, count in zip(parts, rows, strict=True):
        if patch is not None and patch.sizes[0] not in (None, count):
            raise Unsupported(f"a part of {count} rows has a change of {patch.sizes[0]}")
    return join(parts, rows)


def same(first: Expr | None, second: Expr | None) -> bool:
    """Whether two tensors are equal: the same expression, or the same bytes (which are read)."""
    if first is None or second is None or first == second:
        return first is second or first == second
    return (first.dtype, first.shape) == (second.dtype, second.shape) and _digest(first) == _digest(second)


def _digest(tensor: Expr) -> bytes:
    digest = hashlib.sha256()
    for chunk in chunks(tensor):
        digest.update(chunk)
    return digest.digest()


def _shared(patches: Sequence[P], *names: str) -> bool:
    """Whether all patches have the same tensors under these names."""
    first = patches[0]
    return all(same(getattr(first, name), getattr(other, name)) for other in patches[1:] for name in names)


def _equal_scales(patches: Sequence[Any]) -> bool:
    return len({patch.scale for patch in patches}) == 1


def _stack(tensors: Sequence[Expr | None], rows: Sequence[int], axis: int = 0) -> Expr:
    """Tensors under one another (side by side for axis 1), zeros for None, in the widest dtype among them."""
    like = next(tensor for tensor in tensors if tensor is not None)
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    dtype = like.dtype if len(dtypes) == 1 else "F32"
    pieces = []
    for tensor, count in zip(tensors, rows, strict=True):
        shape = list(like.shape)
        shape[axis] = count
        piece = _zeros(tuple(shape), dtype) if tensor is None else tensor
        pieces.append(piece if piece.dtype == dtype else Cast(piece, dtype))
    return e.concat(tuple(pieces), axis)


def _zeros(shape: Shape, dtype: str) -> Literal:
    return Literal(bytes(nbytes(dtype, shape)), dtype, shape)


def _stack_optional(parts: Sequence[Any], name: str, rows: Sequence[int]) -> Expr | None:
    """As ``_stack``, None where no part has the tensor; zeros where some lack it."""
    tensors = [None if part is None else getattr(part, name) for part in parts]
    return None if all(tensor is None for tensor in tensors) else _stack(tensors, rows)


def _magnitudes(parts: Sequence[Any], rows: Sequence[int]) -> Expr | None:
    """The parts' DoRA magnitudes under one another."""
    scales: list[Expr] = [part.dora_scale for part in parts if part is not None and part.dora_scale is not None]
    if not scales:
        return None
    if len(scales) < len(parts):
        raise Unsupported("a part without a DoRA magnitude would need the norms of its base weight's rows")
    if any(part.dora_axis == "in" for part in parts):
        raise Unsupported("DoRA magnitudes per input of parts: one fused norm spans all of them")
    return _stack(_columns(scales, rows), rows)


def _columns(vectors: Sequence[Expr], rows: Sequence[int]) -> list[Expr]:
    """Vectors with one number a row, brought to the same number of dimensions, rows first."""
    tail = (1,) * (max(len(vector.shape) for vector in vectors) - 1)
    return [e.reshape(vector, (count, *tail)) for vector, count in zip(vectors, rows, strict=True)]


def _diagonal(blocks: Sequence[Expr | None], rows: Sequence[int], factors: Sequence[float] | None) -> Expr:
    """Blocks (rows, r_i[, 1, 1]) along a diagonal; a missing one has rows and no columns. ``factors`` multiply them, in fp32."""
    present = [block for block in blocks if block is not None]
    dtypes = {block.dtype for block in present}
    dtype = dtypes.pop() if len(dtypes) == 1 and factors is None else "F32"
    at = list(itertools.accumulate(rows, initial=0))
    starts = tuple(at[i] for i, block in enumerate(blocks) if block is not None)
    shape = (at[-1], sum(block.shape[1] for block in present), *present[0].shape[2:])
    params = (("shape", shape), ("starts", starts), ("factors", None if factors is None else tuple(factors)))
    return Compute(_block_diagonal, tuple(present), shape, dtype, params)


def _block_diagonal(*blocks: Any, shape: Shape, starts: tuple[int, ...], factors: tuple[float, ...] | None) -> Any:
    import torch

    whole, column = torch.zeros(shape, dtype=blocks[0].dtype), 0
    for i, (block, row) in enumerate(zip(blocks, starts, strict=True)):
        value = block if factors is None else block * factors[i]
        whole[row : row + len(block), column : column + block.shape[1]] = value
        column += block.shape[1]
    return whole


def _join_low_rank(parts: Sequence[LowRank | None], rows: Sequence[int]) -> Fused:
    present = [part for part in parts if part is not None]
    if any(part.residual is not None for part in present):
        raise Unsupported("fusing sparse residuals: their coordinates would have to be read")
    common: dict[str, Any] = {
        "dora_scale": _magnitudes(parts, rows),
        "diff_b": _stack_optional(parts, "diff_b", rows),
        "bias": _stack_optional(parts, "bias", rows),
    }
    if _equal_scales(present) and _shared(present, "down", "mid"):
        up = _stack([None if part is None else part.up for part in parts], rows)
        return Fused(replace(present[0], up=up, **common), _filled(parts))
    return _join_blocks([None if part is None else to_lora(part) for part in parts], rows, common)


def _filled(parts: Sequence[Patch | None]) -> str | None:
    return "missing parts are filled with zeros" if any(part is None for part in parts) else None


def _join_blocks(parts: Sequence[Any], rows: Sequence[int], common: dict[str, Any]) -> Fused:
    """Factors that differ: down over down, up block-diagonal, the ranks added."""
    present = [part for part in parts if part is not None]
    if any(part.down.shape[1:] != present[0].down.shape[1:] for part in present):
        raise Unsupported("the parts of one fused weight have unlike inputs")
    factors = None if _equal_scales(present) else [part.scale for part in present]
    if factors is not None and common["bias"] is not None:
        raise Unsupported("fusing scaled bias changes of unequal scales")
    up = _diagonal([None if part is None else _like_down(part) for part in parts], rows, factors)
    down = _stack([part.down for part in present], [part.rank for part in present])
    rank = down.shape[0]
    scale = present[0].scale if factors is None else 1.0
    note = f"parts with unlike factors: block-diagonal, rank {rank}"
    if factors is not None:
        note += "; their unequal scales are folded into up in fp32"
    alpha = None if scale == 1.0 else scale * rank
    return Fused(LowRank(up, down, alpha_value=alpha, **common), note, factors is not None)


def _like_down(part: LowRank) -> Expr:
    """up with as many dimensions as down."""
    return e.reshape(part.up, (*part.up.shape[:2], *(1,) * (len(part.down.shape) - 2)))


def _join_hadamard(parts: Sequence[Hadamard | None], rows: Sequence[int]) -> Fused:
    present = [part for part in parts if part is not None]
    first = present[0]
    shape = None if first.shape is None else (sum(rows), *first.shape[1:])
    common: dict[str, Any] = {
        "dora_scale": _magnitudes(parts, rows),
        "diff_b": _stack_optional(parts, "diff_b", rows),
        "shape": shape,
    }
    names = ("hada_w1_b", "hada_w2_b", "hada_t1", "hada_t2")
    if _equal_scales(present) and _shared(present, *names):
        axis = 1 if first.tucker else 0
        stacked = (
            _stack([None if part is None else getattr(part, name) for part in parts], rows, axis)
            for name in ("hada_w1_a", "hada_w2_a")
        )
        w1_a, w2_a = stacked
        return Fused(replace(first, hada_w1_a=w1_a, hada_w2_a=w2_a, **common), _filled(parts))
    return _join_hadamard_blocks(parts, rows, common)


def _join_hadamard_blocks(parts: Sequence[Hadamard | None], rows: Sequence[int], common: dict[str, Any]) -> Fused:
    """Row by row, (blockdiag(a1) cat(b1)) * (blockdiag(a2) cat(b2)) is the parts' own product."""
    present = [part for part in parts if part is not None]
    if any(part.tucker for part in present):
        raise Unsupported("fusing unlike Tucker cores of LoHas", hint=_AS_LORA)
    if any(part.hada_w1_b.shape[1:] != present[0].hada_w1_b.shape[1:] for part in present):
        raise Unsupported("the parts of one fused weight have unlike inputs")
    factors = None if _equal_scales(present) else [part.scale for part in present]

    def joined(half: str, scales: list[float] | None) -> tuple[Expr, Expr]:
        lefts = [None if part is None else getattr(part, f"hada_{half}_a") for part in parts]
        rights = [getattr(part, f"hada_{half}_b") for part in present]
        return _diagonal(lefts, rows, scales), _stack(rights, [right.shape[0] for right in rights])

    (w1_a, w1_b), (w2_a, w2_b) = joined("w1", factors), joined("w2", None)
    rank, scale = w1_b.shape[0], present[0].scale if factors is None else 1.0
    note = f"parts with unlike factors: block-diagonal, rank {rank}"
    if factors is not None:
        note += "; their unequal scales are folded into hada_w1_a in fp32"
    alpha = None if scale == 1.0 else scale * rank
    return Fused(Hadamard(w1_a, w1_b, w2_a, w2_b, alpha_value=alpha, **common), note, factors is not None)


def _join_kronecker(parts: Sequence[Kronecker | None], rows: Sequence[int]) -> Fused:
    """Parts that share one half: their rows of the other are stacked. Anything else is no Kronecker product any more."""
    present = [part for part in parts if part is not None]
    first = present[0]
    common: dict[str, Any] = {
        "dora_scale": _magnitudes(parts, rows),
        "diff_b": _stack_optional(parts, "diff_b", rows),
        "shape": None if first.shape is None else (sum(rows), *first.shape[1:]),
    }
    w1, w2 = ("lokr_w1", "lokr_w1_a"), ("lokr_w2", "lokr_w2_a")
    rest = ("lokr_w1_b", "lokr_w2_b", "lokr_t2")
    if _equal_scales(present) and _shared(present, *rest):
        block = first.second[0]
        if _shared(present, *w2) and all(count % block == 0 for count in rows):
            return Fused(replace(first, **_stacked(parts, w1, [n // block for n in rows], 0), **common), _filled(parts))
        if first.first[0] == 1 and _shared(present, *w1):
            axis = 0 if first.lokr_t2 is None else 1
            return Fused(replace(first, **_stacked(parts, w2, rows, axis), **common), _filled(parts))
    raise Unsupported("the parts are Kronecker products that share no factor: together they are none", hint=_AS_LORA)


def _stacked(parts: Sequence[Any], names: tuple[str, str], rows: Sequence[int], axis: int) -> dict[str, Any]:
    """Whichever of a whole half and its left factor the parts have, stacked."""
    whole, left = names
    first = next(part for part in parts if part is not None)
    name, at = (whole, 0) if getattr(first, whole) is not None else (left, axis)
    if any(part is not None and getattr(part, name) is None for part in parts):
        raise Unsupported("the parts are decomposed unlike one another", hint=_AS_LORA)
    return {name: _stack([None if part is None else getattr(part, name) for part in parts], rows, at)}


def _join_dense(parts: Sequence[Dense | None], rows: Sequence[int]) -> Fused:
    if any(part is None or part.set_weight is None for part in parts) and any(
        part is not None and part.set_weight is not None for part in parts
    ):
        raise Unsupported("only some parts of one fused weight are replaced")
    joined: dict[str, Any] = {name: _stack_optional(parts, name, rows) for name in (*WEIGHTS, *BIASES)}
    patch = Dense(**joined)
    patch.check("the parts of one fused weight")
    return Fused(patch, _filled(parts))


def _join_rotation(parts: Sequence[Rotation | None], rows: Sequence[int]) -> Fused:
    """Blocks after blocks, unless a norm or a butterfly spans what was never one."""
    present = [part for part in parts if part is not None]
    first = present[0]
    like = {(part.oft_blocks is None, part.block_size, part.blocks.shape[:-3], part.flavour) for part in present}
    if len(like) > 1 or first.oft_blocks is None or any(part.constrained for part in present):
        raise Unsupported("rotations with a constraint, or of unlike blocks, do not make one rotation")
    if len({part.constraint for part in present}) > 1 or (_filled(parts) and first.rescale is not None):
        raise Unsupported("rotations with unlike constraints, or rescaled beside a part that is not, do not make one")
    if any(count % first.block_size for count in rows) or any(
        (part.rescale is None) != (first.rescale is None) for part in present
    ):
        raise Unsupported("rotations whose blocks or rescaling do not cover the parts alike")
    blocks = [None if part is None else part.oft_blocks for part in parts]
    patch = replace(
        first,
        oft_blocks=_stack(blocks, [n // first.block_size for n in rows], 1 if first.butterfly else 0),
        rescale=_stack_optional(parts, "rescale", rows),
        diff_b=_stack_optional(parts, "diff_b", rows),
    )
    return Fused(patch, _filled(parts))


def _join_input_rotation(parts: Sequence[InputRotation | None], rows: Sequence[int]) -> Fused:
    present = [part for part in parts if part is not None]
    names = ("oft_R", "scaled_oft", "boft_R")
    if len(present) < len(parts) or not _shared(present, *names):
        raise Unsupported("the parts rotate their common inputs differently: together they are no rotation")
    cut: dict[str, Any] = {}
    for name in ("boft_s", "dora_scale", "initial_norm"):
        vectors = [tensor for part in present if (tensor := getattr(part, name)) is not None]
        if vectors and len(vectors) < len(present):
            raise Unsupported(f"only some parts have {name}")
        cut[name] = _stack(_columns(vectors, rows), rows) if vectors else None
    return Fused(replace(present[0], **cut))


def _join_glora(parts: Sequence[GLoRA | None], rows: Sequence[int]) -> Fused:
    present = [part for part in parts if part is not None]
    first = present[0]
    orders = {part.old_order for part in present}
    left, right = ("b2", "b1") if first.old_order else ("b1", "b2")
    whole = len(orders) == 1 and len(present) == len(parts) and _equal_scales(present)
    if not whole or not _shared(present, "a1", "a2", right, "bm"):
        raise Unsupported("the parts mix their common inputs differently: together they are no GLoRA")
    cut: dict[str, Any] = {name: _stack_optional(parts, name, rows) for name in (left, "diff_b")}
    return Fused(replace(first, **cut))


def _join_scaling(parts: Sequence[Scaling | None], rows: Sequence[int]) -> Fused:
    present = [part for part in parts if part is not None]
    if len(present) < len(parts) or not _shared(present, "on_input"):
        raise Unsupported("only some parts of one fused weight are rescaled, or unlike one another")
    first = present[0]
    name = "ia3" if first.ia3 is not None else "ia3_l"
    if {part.axis for part in present} == {"out"} and all(getattr(part, name) is not None for part in present):
        flat = all(len(part.vector.shape) == 1 or part.vector.shape[0] != 1 for part in present)
        joined: dict[str, Any] = {name: _stack([part.vector for part in present], rows, 0 if flat else 1)}
        return Fused(replace(first, **joined))
    if _shared(present, "ia3", "ia3_l"):
        return Fused(first)
    raise Unsupported("the parts rescale their common inputs differently: together they are no IA3")


_JOINS: dict[type, Callable[[Any, Sequence[int]], Fused]] = {
    LowRank: _join_low_rank,
    Hadamard: _join_hadamard,
    Kronecker: _join_kronecker,
    Dense: _join_dense,
    Rotation: _join_rotation,
    InputRotation: _join_input_rotation,
    GLoRA: _join_glora,
    Scaling: _join_scaling,
}
