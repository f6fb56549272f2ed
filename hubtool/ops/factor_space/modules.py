"""The merged patch of one module: copied, summed as whole differences, or made of factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from hubtool.adapters.dense import Dense
from hubtool.adapters.ir import ModuleKey, Patch
from hubtool.adapters.low_rank import LowRank
from hubtool.adapters.promote import to_lora
from hubtool.adapters.scaling import Scaling
from hubtool.errors import ShapeMismatch, Unsupported
from hubtool.ops.factor_space import scalings, terms
from hubtool.ops.factor_space.blend import Blend, Measured, Space, Written, merged
from hubtool.ops.factor_space.coefficients import plain
from hubtool.ops.factor_space.terms import Addend, Factors
from hubtool.ops.methods import Method
from hubtool.tensors import expr as e
from hubtool.tensors.dtypes import numel
from hubtool.tensors.expr import Compute, Expr, sources
from hubtool.types import Shape


@dataclass(frozen=True, slots=True)
class Asked:
    """What holds for every module. ``based``: the last input is what the others are taken as changes of. ``alpha``: None for alpha = rank
    (and copies as they are). ``dtype``: None for the widest input's."""

    method: Method
    parameters: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    based: bool = False
    space: Space = "dense"
    seed: int = 0
    alpha: float | None = None
    dtype: str | None = None
    report: Measured = field(default_factory=Measured)


@dataclass(frozen=True, slots=True)
class Slot:
    """One module before merging. ``patches``: those of the inputs that change it, by their number; ``strengths``: of every input here,
    the base's not counted; ``shape``: its weight's, where a table knows it."""

    key: ModuleKey
    patches: Mapping[int, Patch]
    strengths: tuple[float, ...]
    shape: Shape | None = None

    @property
    def name(self) -> str:
        return ".".join(self.key)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(patch.rank or 0 for patch in self.patches.values())

    def shares(self, asked: Asked) -> list[float]:
        """The factor of each patch in a plain sum. Raises ``Unsupported`` for a method that needs the changes themselves."""
        if not asked.method.linear:
            raise Unsupported(
                f"{asked.method.id} of biases, norms and whole differences",
                hint="merge these with --method weighted_sum",
            )
        known = plain(asked.method, self.strengths, asked.parameters, based=asked.based)
        return [known[index] for index in self.patches]


@dataclass(frozen=True, slots=True)
class Job:
    """One module on its way. ``factors``: what is blended; without them ``done`` is the patch already. ``natural``: the rank that loses
    nothing; ``usual``: the rank where none is asked for; ``company``: a magnitude and changes of the bias that go with the result.
    ``how``: see ``report.Module``."""

    slot: Slot
    how: str
    done: Patch | None = None
    shape: Shape = ()
    factors: tuple[Factors, ...] = ()
    blend: Blend | None = None
    natural: int = 0
    usual: int = 0
    dtype: str = "F32"
    company: Mapping[str, Expr] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def cost(self) -> int:
        """Numbers that one rank takes."""
        return sum(terms.numbers(self.shape))


def prepare(slot: Slot, asked: Asked, cap: int | None) -> Job:
    """The job of one module. ``cap``: the rank that must not be exceeded, 0 where a budget chooses ranks later, None for any.

    Raises ``Unsupported``, ``ShapeMismatch``.
    """
    if len(slot.patches) == 1 and asked.method.linear:
        return _alone(slot, asked, cap)
    vectors = [patch for patch in slot.patches.values() if isinstance(patch, Scaling)]
    if len(vectors) == len(slot.patches):
        return Job(slot, "summed", scalings.summed(vectors, slot.shares(asked), asked.dtype))
    addends = [terms.addend(patch, slot.shape) for patch in slot.patches.values()]
    shape = _common_shape(slot, addends)
    if shape is None or any(one.dense is not None for one in addends):
        return Job(slot, "summed", _dense(slot, addends, asked, shape))
    factors = {i: one.factors for i, one in zip(slot.patches, addends, strict=True) if one.factors is not None}
    bias = _bias(slot, addends, asked, shape[0])
    return _blended(slot, factors, shape, asked, {} if bias is None else {"diff_b": bias})


def _alone(slot: Slot, asked: Asked, cap: int | None) -> Job:
    """A module that one input changes: its own factors where their rank is not too much, else truncated; a magnitude stays."""
    ((index, patch),), (share,) = slot.patches.items(), slot.shares(asked)
    if _stays(patch, asked, cap):
        return Job(slot, "copied", terms.strengthened(patch, share))
    made = to_lora(patch, terms.fitting(patch, slot.shape))
    terms.strengthened(made, share)  # raises the reason where a magnitude forbids it
    bias = _bias(slot, [terms.addend(replace(made, dora_scale=None))], asked, made.up.shape[0])
    company = {
        role: tensor for role, tensor in (("dora_scale", made.dora_scale), ("diff_b", bias)) if tensor is not None
    }
    return _blended(slot, {index: Factors(made.up, made.down, made.scale)}, made.weight_shape, asked, company)


def _stays(patch: Patch, asked: Asked, cap: int | None) -> bool:
    if patch.algorithm in ("loha", "lokr"):
        return cap is None
    if not isinstance(patch, LowRank) or patch.residual is not None:
        return True  # no low-rank form that could be shortened
    return asked.alpha is None and (cap is None or (patch.mid is None and patch.rank <= cap))


def _blended(
    slot: Slot, factors: Mapping[int, Factors], shape: Shape, asked: Asked, company: Mapping[str, Expr]
) -> Job:
    tensors = tuple(tensor for one in factors.values() for tensor in (one.up, one.down))
    blend = Blend(
        name=slot.name,
        method=asked.method,
        weights=slot.strengths,
        present=tuple(factors),
        scales=tuple(one.scale for one in factors.values()),
        based=asked.based,
        space=asked.space,
        parameters=asked.parameters,
        seed=asked.seed,
        tensors=tuple(next((ref.name for ref in sources(tensor)), "a factor") for tensor in tensors),
    )
    usual = min(sum(one.rank for one in factors.values()), *terms.numbers(shape))
    natural = usual if blend.stays_low else min(terms.numbers(shape))
    dtype = asked.dtype or widest(tensor.dtype for tensor in tensors)
    return Job(slot, "exact", None, shape, tuple(factors.values()), blend, natural, usual, dtype, company)


def widest(dtypes: Iterable[str]) -> str:
    """The dtype that holds all of them: F32 for mixed halves, F16 for what is smaller than half precision."""
    found = set(dtypes)
    if found <= {"BF16"}:
        return "BF16"
    return "F16" if all(one == "F16" or one.startswith("F8") for one in found) else "F32"


def _common_shape(slot: Slot, addends: Sequence[Addend]) -> Shape | None:
    """The weight's shape, on which all must agree but for trailing ones; None where only biases change. Raises ``ShapeMismatch``."""
    found = [one.shape for one in addends if one.shape is not None]
    for one in found[1:]:
        if (one[0], numel(one)) != (found[0][0], numel(found[0])):
            raise ShapeMismatch(f"{slot.name}: one input changes a weight of {found[0]}, another one of {one}")
    return slot.shape if slot.shape in found else next(iter(found), None)


def _bias(slot: Slot, addends: Sequence[Addend], asked: Asked, rows: int) -> Expr | None:
    """The changes of the bias, summed."""
    if not any(one.biases for one in addends):
        return None
    rows_of = zip(slot.shares(asked), addends, strict=True)
    found = [(share * scale, tensor) for share, one in rows_of for scale, tensor in one.biases]
    return terms.summed(found, (rows,), asked.dtype or widest(tensor.dtype for _, tensor in found))


def _dense(slot: Slot, addends: Sequence[Addend], asked: Asked, shape: Shape | None) -> Dense:
    """Whole differences (and products beside them), summed."""
    found: list[tuple[float, Expr]] = []
    for share, one in zip(slot.shares(asked), addends, strict=True):
        if one.dense is not None:
            found.append((share, one.dense))
        elif one.factors is not None:
            found.append((share * one.factors.scale, _product(one.factors)))
    rows = shape[0] if shape else numel(next(one.biases[0][1].shape for one in addends if one.biases))
    bias = _bias(slot, addends, asked, rows)
    dtype = asked.dtype or widest(tensor.dtype for _, tensor in found)
    weight = None if shape is None else terms.summed(found, shape, dtype, partial(asked.report.add, slot.name))
    norm = all(one.norm for one in addends)
    return Dense(w_norm=weight, b_norm=bias) if norm else Dense(diff=weight, diff_b=bias)


def _product(factors: Factors) -> Expr:
    shape = (factors.up.shape[0], *factors.down.shape[1:])
    return Compute(_multiplied, (factors.up, factors.down), shape, "F32")


def _multiplied(up: Any, down: Any) -> Any:
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def finished(job: Job, rank: int, asked: Asked) -> LowRank:
    """The low-rank patch of a job at a rank."""
    assert job.blend is not None
    alpha = float(rank) if asked.alpha is None else asked.alpha
    up, down = merged(job.factors, job.blend, Written(rank, job.shape, job.dtype, alpha / rank, asked.report))
    return _accompanied(LowRank(up, down, alpha_value=alpha), job)


def side_by_side(job: Job, asked: Asked) -> LowRank | None:
    """The inputs' own numbers one beside the other, with what they have in common as alpha; None where that takes arithmetic."""
    shares = [abs(share * one.scale) for share, one in zip(job.slot.shares(asked), job.factors, strict=True)]
    dtypes = {tensor.dtype for one in job.factors for tensor in (one.up, one.down)}
    rank = sum(one.rank for one in job.factors)
    if len(set(shares)) > 1 or dtypes != {job.dtype} or rank > job.natural:
        return None
    out, *inner = job.shape
    signs = [-1.0 if share < 0 else 1.0 for share in job.slot.shares(asked)]
    ones = (1,) * (len(inner) - 1)
    ups = (
        e.reshape(terms.scaled(one.up, sign), (out, one.rank, *ones))
        for one, sign in zip(job.factors, signs, strict=True)
    )
    downs = (e.reshape(one.down, (one.rank, *inner)) for one in job.factors)
    joined = LowRank(e.concat(tuple(ups), 1), e.concat(tuple(downs)), alpha_value=shares[0] * rank)
    return _accompanied(joined, job)


def _accompanied(patch: LowRank, job: Job) -> LowRank:
    return replace(patch, dora_scale=job.company.get("dora_scale"), diff_b=job.company.get("diff_b"))
