"""Several adapters as one, without their base: what will be written, and how far it is from what was wanted.

The change of every module is what the method makes of the inputs' changes dW_i = scale_i up_i down_i; a truncation is the best that its rank
allows. Which kinds are exact: LoRA, LoCon, Tucker, LoHa, LoKr (as products of two factors), whole differences, norms and biases (summed as
such), IA3 beside IA3 of the same axis. A module that a single input changes is kept as it is, of whatever kind, at strength 1. DoRA, OFT
and GLoRA change the base by factors of itself: beside another input's change of the same module they are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from hubtool.adapters.ir import Adapter, ModuleKey, Patch
from hubtool.adapters.low_rank import LowRank
from hubtool.errors import Unsupported, UsageProblem
from hubtool.layouts import tables, vocabulary
from hubtool.ops import adapters as spelling
from hubtool.ops.factor_space import copies, fused, output, reading, terms
from hubtool.ops.factor_space.blend import Space
from hubtool.ops.factor_space.budget import Budget, ranks
from hubtool.ops.factor_space.coefficients import combines
from hubtool.ops.factor_space.modules import Asked, Job, Slot, finished, prepare, side_by_side
from hubtool.ops.factor_space.reading import Source
from hubtool.ops.factor_space.report import Module, Report
from hubtool.ops.factor_space.spectra import spectra
from hubtool.ops.methods import Method, find
from hubtool.ops.plan import Plan
from hubtool.ops.strengths import Strengths
from hubtool.ops.target import DTYPES
from hubtool.tensors.dtypes import BITS
from hubtool.tensors.expr import size

__all__ = ["Report", "Request", "Source", "plan"]

_NAMES = MappingProxyType({"concat": "weighted_sum", "linear": "weighted_sum"})


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked. ``method``: an id of ``ops.methods``, or ``linear``/``concat`` for the weighted sum. ``concat``
    keeps every rank, and every number where all strengths * alpha / rank of a module are equal: alpha then says what they are.

    ``budget``: how many ranks; without one a sum keeps every rank, and a method that looks at entries keeps as many as the inputs have
    together. ``space``: where such a method looks (``dense`` products, ``core``, ``knots``). ``alpha``: None for alpha = rank where
    factors are made anew, and whatever needs no rounding where they are copied. ``layout``, ``dtype``: None for the first input's, the
    widest input's.
    """

    method: str = "linear"
    parameters: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    budget: Budget = field(default_factory=Budget)
    space: Space = "dense"
    layout: str | None = None
    format: str | None = None
    dtype: str | None = None
    alpha: float | None = None
    family: str | None = None
    component: str | None = None
    seed: int = 0
    workers: int | None = None


def plan(inputs: Sequence[Source], request: Request, base: Source | None = None) -> tuple[Plan, Report]:
    """What merging ``inputs`` will write. ``base``: an adapter that the others are taken as changes of.

    Reads headers only, unless a budget depends on the numbers. The report's errors are known once the plan was carried out.
    Raises ``UsageProblem``, ``ConversionError`` and its kin; ``BadValues`` when the plan is carried out.
    """
    request = replace(request, dtype=_dtype(request.dtype))
    method = _method(request, len(inputs), base is not None)
    sources = [*inputs, *([] if base is None else [base])]
    parsed = reading.read(sources, request.family)
    first = parsed[0]
    adapters = [spelling.selected(one.adapter, request.component) for one in parsed]
    family = first.adapter.family or next(iter(first.candidates), None)
    reading.check([one.strengths for one in inputs], adapters, family)
    strengths = [one.strengths.resolved(family) for one in inputs]
    report = Report(len(inputs), dtype=request.dtype)
    asked = Asked(
        method,
        request.parameters,
        base is not None,
        request.space,
        request.seed,
        request.alpha,
        request.dtype,
        report.measured,
    )
    naming = _naming(request.layout or str(first.layout), family)
    slots = _slots(adapters, strengths, naming, family)
    patches = _patches(_jobs(slots, asked, request, report), asked, request, report)
    merged = output.adapter(adapters, patches, first.adapter.family, report)
    emission = spelling.spelled(merged, request.layout or str(first.layout), first, request.family)
    made = output.plan(inputs[0].file.path, merged, emission, report, request.format, request.dtype)
    return made, report


def _method(request: Request, inputs: int, based: bool) -> Method:
    method = find(_NAMES.get(request.method, request.method))
    method.check_inputs(inputs, base=based)
    method.checked(request.parameters)
    if request.method == "concat" and request.budget != Budget():
        raise UsageProblem("concat keeps every rank", hint="--method linear truncates to a rank, an error or a size")
    if request.space != "dense" and combines(method):
        raise UsageProblem(f"{method.id} gives the same in every space", hint="leave out --space")
    return method


def _dtype(name: str | None) -> str | None:
    """The safetensors name of what the user calls a dtype."""
    if name is None:
        return None
    found = DTYPES.get(name.lower(), name.upper())
    if found not in DTYPES.values():
        raise UsageProblem(f"no such dtype: {name}", hint="one of fp16, bf16, fp32")
    return found


def _naming(layout: str, family: str | None) -> str:
    return tables.layout(layout, family).naming


def _slots(adapters: Sequence[Adapter], strengths: Sequence[Strengths], naming: str, family: str | None) -> list[Slot]:
    """Every module of any input, in the order in which they come first."""

    def alike(keys: Sequence[ModuleKey]) -> bool:
        return all(len({one.of(*key) for key in keys}) == 1 for one in strengths)

    joined, whole = fused.together(adapters, naming, family, alike)
    slots = []
    for key in dict.fromkeys(key for adapter in joined for key in adapter.patches):
        patches = {i: adapter.patches[key] for i, adapter in enumerate(joined) if key in adapter.patches}
        own = tuple(one.of(*whole.get(key, key)) for one in strengths)
        shape = None if key in whole or family is None else vocabulary.weight_shape(family, *key)
        slots.append(Slot(key, patches, own, shape))
    return slots


def _jobs(slots: Sequence[Slot], asked: Asked, request: Request, report: Report) -> list[Job]:
    """A job for every module that is not left alone. Raises ``Unsupported`` naming the first of those that cannot be merged."""
    cap = 0 if request.budget.needs_spectra else request.budget.cap
    jobs: list[Job] = []
    refused: list[tuple[str, Unsupported]] = []
    for slot in slots:
        active = _active(slot, asked)
        if not active.patches:
            report.unchanged.append(slot.name)
            continue
        try:
            jobs.append(prepare(active, asked, cap))
        except Unsupported as reason:
            refused.append((slot.name, reason))
    if refused:
        name, first = refused[0]
        more = f" (and {len(refused) - 1} more modules)" if len(refused) > 1 else ""
        raise Unsupported(f"{name}: {first.message}{more}", hint=first.hint)
    if not jobs:
        raise UsageProblem("with these strengths nothing is left to merge")
    return jobs


def _active(slot: Slot, asked: Asked) -> Slot:
    """Without the inputs that a linear method gives no share of the module."""
    if not asked.method.linear:
        return slot
    kept = {
        index: patch for (index, patch), share in zip(slot.patches.items(), slot.shares(asked), strict=True) if share
    }
    return replace(slot, patches=MappingProxyType(kept))


def _patches(jobs: Sequence[Job], asked: Asked, request: Request, report: Report) -> dict[ModuleKey, Patch]:
    wanted = _ranks(jobs, request, report)
    patches: dict[ModuleKey, Patch] = {}
    for job in jobs:
        patch, how = job.done, job.how
        if patch is None:
            rank = wanted[job.slot.key]
            if rank == 0:
                report.dropped.append(job.slot.name)
                continue
            patch, how = _made(job, rank, asked, request)
        patches[job.slot.key] = patch
        if how == "copied" and copies.measurable(patch):
            report.copied[job.slot.name] = patch
        report.modules[job.slot.name] = Module(len(job.slot.patches), job.slot.ranks, patch.rank, how)
    if not patches:
        raise UsageProblem("the budget has no place for a single module")
    return patches


def _made(job: Job, rank: int, asked: Asked, request: Request) -> tuple[Patch, str]:
    """(the patch at a rank, how it was made). Where a budget leaves a single input's factors whole, they are copied after all."""
    if len(job.slot.patches) == 1 and asked.method.linear and asked.alpha is None:
        ((_, patch),) = job.slot.patches.items()
        if isinstance(patch, LowRank) and patch.mid is None and patch.rank <= rank:
            return terms.strengthened(patch, *job.slot.shares(asked)), "copied"
    joined = side_by_side(job, asked) if request.method == "concat" and asked.alpha is None else None
    if joined is not None:
        return joined, "copied"
    return finished(job, rank, asked), "exact" if rank >= job.natural and combines(asked.method) else "truncated"


def _ranks(jobs: Sequence[Job], request: Request, report: Report) -> dict[ModuleKey, int]:
    """The rank of every module that is made of factors. What a module without a rank loses is noted in the report."""
    blended = {job.slot.key: job for job in jobs if job.done is None}
    if not request.budget.needs_spectra:
        cap = request.budget.cap
        return {key: job.usual if cap is None else min(job.natural, cap) for key, job in blended.items()}
    listed = spectra(list(blended.values()), request.budget.cap, request.workers)
    budget = request.budget
    if budget.size is not None:
        whole = (size(tensor) for job in jobs if job.done is not None for _, tensor in job.done.roles())
        budget = replace(budget, size=max(budget.size - sum(whole), 1))
    costs = {key: job.cost * BITS[job.dtype] // 8 for key, job in blended.items()}
    found = ranks(dict(zip(blended, listed, strict=True)), costs, budget)
    for (key, rank), one in zip(found.items(), listed, strict=True):
        if rank == 0:
            report.measured.add(".".join(key), one.energy, one.energy)
    return found
