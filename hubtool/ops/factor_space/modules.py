"""The merged patch of one module: copied, summed as whole differences, or made of factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from hubtool.adapters.dense import Dense
from hubtool.adapters.ir import ModuleKey, Patch
from hubtool.adapters.low_rank import LowRank
from hubtool.adapters.promote import to_lora
from hubtool.errors import ShapeMismatch, Unsupported
from hubtool.ops.factor_space import terms
from hubtool.ops.factor_space.blend import Blend, Measured, Space, Written, merged
from hubtool.ops.factor_space.coefficients import plain
from hubtool.ops.factor_space.terms import Addend, Factors
from hubtool.ops.methods import Method
from hubtool.tensors.dtypes import numel
from hubtool.tensors.expr import Compute, Expr, sources
from hubtool.types import Shape


@dataclass(frozen=True, slots=True)
class Asked:
    """What holds for every module. ``alpha``: None for alpha = rank (and copies as they are). ``dtype``: None for the widest input's."""

    inputs: int
    method: Method
    parameters: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    based: bool = False
    space: Space = "dense"
    seed: int = 0
    alpha: float | None = None
    dtype: str | None = None
    report: Measured = field(default_factory=Measured)

    def weights(self, contributions: Sequence[Contribution]) -> tuple[float, ...]:
        """The strength of every input in a module, the base not counted; 0 where an input leaves it alone."""
        found = {one.index: one.strength for one in contributions}
        return tuple(found.get(index, 0.0) for index in range(self.inputs))

    def shares(self, contributions: Sequence[Contribution]) -> list[float]:
        """The factor of each contribution in a plain sum. Raises ``Unsupported`` for a method that needs the changes themselves."""
        if not self.method.linear:
            raise Unsupported(
                f"{self.method.id} of biases, norms and whole differences",
                hint="merge these with --method weighted_sum",
            )
        known = plain(self.method, self.weights(contributions), self.parameters, based=self.based)
        return [known[one.index] for one in contributions]


@dataclass(frozen=True, slots=True)
class Contribution:
    """One input's patch of a module and its strength there."""

    index: int
    strength: float
    patch: Patch


@dataclass(frozen=True, slots=True)
class Job:
    """One module. ``factors``: what is blended; empty where ``done`` is the patch already. ``natural``: the rank that loses nothing.

    ``company``: a patch whose magnitude and biases go with the result.
    """

    key: ModuleKey
    ranks: tuple[int, ...]
    inputs: int
    shape: Shape = ()
    factors: tuple[Factors, ...] = ()
    blend: Blend | None = None
    natural: int = 0
    dtype: str = "F32"
    company: Patch | None = None
    done: Patch | None = None
    how: str = "copied"

    @property
    def name(self) -> str:
        return ".".join(self.key)

    @property
    def cost(self) -> int:
        """Numbers that one rank takes."""
        return sum(terms.numbers(self.shape))


def prepare(
    key: ModuleKey, contributions: Sequence[Contribution], asked: Asked, shape: Shape | None, cap: int | None
) -> Job:
    """The job of one module. ``shape``: its weight's, where a table knows it; ``cap``: a rank that must not be exceeded, 0 for any rank
    that a budget may choose later. Raises ``Unsupported``, ``ShapeMismatch``."""
    ranks = tuple(one.patch.rank or 0 for one in contributions)
    copy = _copied(key, contributions, asked, ranks, cap)
    if copy is not None:
        return copy
    if len(contributions) == 1 and asked.method.linear:
        return _alone(key, contributions[0], asked, shape)
    addends = [terms.addend(one.patch, shape) for one in contributions]
    whole = _common_shape(".".join(key), addends, shape)
    base = Job(key, ranks, len(contributions), whole or ())
    if whole is None or any(one.dense is not None for one in addends):
        return replace(base, done=_dense(base.name, contributions, addends, asked, whole), how="summed")
    factors = tuple(one.factors for one in addends if one.factors is not None)
    present = [one for one, term in zip(contributions, addends, strict=True) if term.factors is not None]
    company = _bias(contributions, addends, asked, numel(whole[:1]))
    return _blended(replace(base, company=company), factors, present, contributions, asked)


def _copied(
    key: ModuleKey, contributions: Sequence[Contribution], asked: Asked, ranks: tuple[int, ...], cap: int | None
) -> Job | None:
    """An input's own factors, where nobody else changes the module and no rank is too many."""
    if len(contributions) > 1 or not asked.method.linear:
        return None
    (only,), (strength,) = contributions, asked.shares(contributions)
    small = cap is None or (isinstance(only.patch, LowRank) and only.patch.mid is None and only.patch.rank <= cap)
    loose = not isinstance(only.patch, LowRank) and not _promotable(only.patch)
    kept = isinstance(only.patch, LowRank) and only.patch.residual is not None
    if not (small or loose or kept) or (asked.alpha is not None and isinstance(only.patch, LowRank) and not kept):
        return None
    return Job(key, ranks, 1, done=terms.strengthened(only.patch, strength))


def _promotable(patch: Patch) -> bool:
    return patch.algorithm in ("loha", "lokr")


def _alone(key: ModuleKey, only: Contribution, asked: Asked, shape: Shape | None) -> Job:
    """One input's low-rank change, to be truncated; a magnitude and biases stay."""
    made = to_lora(only.patch, shape)
    terms.strengthened(made, *asked.shares([only]))  # raises the reason where a magnitude forbids it
    factors = (Factors(made.up, made.down, made.scale),)
    own = terms.addend(replace(made, dora_scale=None))
    company = _bias([only], [own], asked, made.up.shape[0])
    if made.dora_scale is not None:
        company = replace(company or Dense(), alpha=made.dora_scale)
    base = Job(key, (only.patch.rank or 0,), 1, made.weight_shape, company=company)
    return _blended(base, factors, [only], [only], asked)


def _blended(
    base: Job, factors: tuple[Factors, ...], present: Sequence[Contribution], all_: Sequence[Contribution], asked: Asked
) -> Job:
    tensors = tuple(tensor for one in factors for tensor in (one.up, one.down))
    blend = Blend(
        name=base.name,
        method=asked.method,
        weights=asked.weights(all_),
        present=tuple(one.index for one in present),
        scales=tuple(one.scale for one in factors),
        based=asked.based,
        space=asked.space,
        parameters=asked.parameters,
        seed=asked.seed,
        tensors=tuple(_called(tensor) for tensor in tensors),
    )
    total = sum(one.rank for one in factors)
    natural = min(total, *terms.numbers(base.shape))
    dtype = asked.dtype or widest(tensor.dtype for tensor in tensors)
    return replace(base, factors=factors, blend=blend, natural=natural, dtype=dtype, how="exact")


def _called(tensor: Expr) -> str:
    return next((ref.name for ref in sources(tensor)), "a factor")


def widest(dtypes: Iterable[str]) -> str:
    """The dtype that holds all of them: F32 for mixed halves, F16 for what is smaller than half precision."""
    found = set(dtypes)
    if found <= {"BF16"}:
        return "BF16"
    return "F16" if all(one == "F16" or one.startswith("F8") for one in found) else "F32"


def _common_shape(name: str, addends: Sequence[Addend], shape: Shape | None) -> Shape | None:
    """The weight's shape, on which all must agree but for trailing ones. Raises ``ShapeMismatch`` with both."""
    found = [one.shape for one in addends if one.shape is not None]
    for one in found[1:]:
        if (one[0], numel(one)) != (found[0][0], numel(found[0])):
            raise ShapeMismatch(f"{name}: one input changes a weight of {found[0]}, another one of {one}")
    fitting = [one for one in found if one == shape]
    return (fitting or found or [None])[0]


def _bias(contributions: Sequence[Contribution], addends: Sequence[Addend], asked: Asked, rows: int) -> Dense | None:
    """The changes of the bias as one ``diff_b``."""
    found = [
        (strength * scale, tensor)
        for strength, one in zip(asked.shares(contributions), addends, strict=True)
        for scale, tensor in one.biases
    ]
    if not found:
        return None
    return Dense(diff_b=terms.summed(found, (rows,), asked.dtype or widest(tensor.dtype for _, tensor in found)))


def _dense(
    name: str, contributions: Sequence[Contribution], addends: Sequence[Addend], asked: Asked, shape: Shape | None
) -> Dense:
    """Whole differences (and products beside them), summed."""
    strengths = asked.shares(contributions)
    found: list[tuple[float, Expr]] = []
    for strength, one in zip(strengths, addends, strict=True):
        if one.dense is not None:
            found.append((strength, one.dense))
        elif one.factors is not None:
            found.append((strength * one.factors.scale, _product(one.factors)))
    rows = shape[0] if shape else numel(next(one.biases[0][1].shape for one in addends if one.biases))
    bias = _bias(contributions, addends, asked, rows)
    dtype = asked.dtype or widest(tensor.dtype for _, tensor in found)
    weight = None if shape is None else terms.summed(found, shape, dtype)
    diff_b = None if bias is None else bias.diff_b
    if all(one.norm for one in addends):
        return Dense(w_norm=weight, b_norm=diff_b)
    return Dense(diff=weight, diff_b=diff_b)


def _product(factors: Factors) -> Expr:
    shape = (factors.up.shape[0], *factors.down.shape[1:])
    return Compute(_multiplied, (factors.up, factors.down), shape, "F32")


def _multiplied(up: Any, down: Any) -> Any:
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def finished(job: Job, rank: int, asked: Asked) -> LowRank:
    """The low-rank patch of a job at a rank."""
    assert job.blend is not None
    scale = 1.0 if asked.alpha is None else asked.alpha / rank
    written = Written(rank, job.shape, job.dtype, scale, asked.report)
    up, down = merged(job.factors, job.blend, written)
    company = job.company if isinstance(job.company, Dense) else Dense()
    return LowRank(up, down, alpha_value=scale * rank, dora_scale=company.alpha, diff_b=company.diff_b)
