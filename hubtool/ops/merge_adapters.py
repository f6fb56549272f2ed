"""Several adapters as one, without their base: what will be written, and how far it is from what was wanted.

The change of every module is what the method makes of the inputs' changes dW_i = scale_i up_i down_i; a truncation is the best that its rank
allows. Which kinds are exact: LoRA, LoCon, Tucker, LoHa, LoKr (as products of two factors), whole differences, norms and biases (summed as
such). A module that a single input changes is kept as it is, of whatever kind, at strength 1. DoRA, OFT, IA3 and GLoRA change the base by
factors of itself: beside another input's change of the same module they are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from hubtool.adapters.fusing import same
from hubtool.adapters.ir import Adapter, Embedding, ModuleKey, Patch
from hubtool.adapters.low_rank import LowRank
from hubtool.errors import ConversionError, Unsupported, UsageProblem
from hubtool.formats.base import TensorFile
from hubtool.layouts import vocabulary
from hubtool.layouts.emission import Emission, Loss
from hubtool.layouts.parse import Parsed, parse_file
from hubtool.layouts.receipt import carried_metadata
from hubtool.ops import adapters as spelling
from hubtool.ops.adapters import _container
from hubtool.ops.convert import DTYPES
from hubtool.ops.factor_space import fused, terms
from hubtool.ops.factor_space.blend import Space
from hubtool.ops.factor_space.budget import Budget, ranks
from hubtool.ops.factor_space.coefficients import combines
from hubtool.ops.factor_space.modules import Asked, Job, Slot, finished, prepare
from hubtool.ops.factor_space.report import Module, Report
from hubtool.ops.factor_space.spectra import spectra
from hubtool.ops.methods import Method, find
from hubtool.ops.plan import Plan
from hubtool.ops.strengths import Strengths
from hubtool.tensors.dtypes import BITS, FLOATS
from hubtool.tensors.expr import Expr, size
from hubtool.tensors.ref import TensorRef

_NAMES = MappingProxyType({"concat": "weighted_sum", "linear": "weighted_sum"})


@dataclass(frozen=True, slots=True)
class Source:
    """An input and how strong it counts."""

    file: TensorFile
    strengths: Strengths = field(default_factory=Strengths)


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked. ``method``: an id of ``ops.methods``, or ``linear``/``concat`` for the weighted sum (concat: every rank kept).

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
    parsed = _parsed(sources, request)
    first = parsed[0]
    adapters = [spelling.selected(one.adapter, request.component) for one in parsed]
    family = first.adapter.family or next(iter(first.candidates), None)
    _check_strengths([one.strengths for one in inputs], adapters, family)
    strengths = [one.strengths.resolved(family) for one in inputs]
    report = Report(len(inputs))
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
    merged = _adapter(adapters, patches, first.adapter.family, report)
    emission = spelling.spelled(merged, request.layout or str(first.layout), first, request.family)
    return _plan(sources, merged, emission, request, report), report


def between(inputs: Sequence[Source], steps: int, request: Request) -> Iterator[tuple[float, Plan, Report]]:
    """``steps`` plans from the first input (t = 0) to the second (t = 1), both ends included; by ``weighted_sum`` or ``slerp``."""
    if len(inputs) != 2 or steps < 2:
        raise UsageProblem("steps lead from one adapter to another", hint="name two adapters, and at least 2 steps")
    for step in range(steps):
        t = step / (steps - 1)
        moved = [_times(one, share) for one, share in zip(inputs, (1 - t, t), strict=True)]
        yield t, *plan(moved, request)


def _times(source: Source, share: float) -> Source:
    """The source at ``share`` of its strengths."""
    old = source.strengths
    components = MappingProxyType({name: value * share for name, value in old.components.items()})
    patterns = tuple((pattern, value * share) for pattern, value in old.patterns)
    return replace(
        source, strengths=replace(old, default=old.default * share, components=components, patterns=patterns)
    )


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


def _parsed(sources: Sequence[Source], request: Request) -> list[Parsed]:
    """Every input, read as one family; as the candidates they share where no file can tell. Raises ``ConversionError``."""
    found = [parse_file(one.file, request.family) for one in sources]
    known = {
        one.adapter.family: source.file.path.name
        for one, source in zip(found, sources, strict=True)
        if one.adapter.family
    }
    if len(known) > 1:
        told = ", ".join(f"{name} is {family}" for family, name in known.items())
        raise ConversionError(
            f"adapters of different families: {told}", hint="an adapter only means something beside its base"
        )
    family = next(iter(known), None)
    found = [_as(family, one, source.file) for one, source in zip(found, sources, strict=True)]
    for one, source in zip(found, sources, strict=True):
        _refuse(one.adapter, source.file)
    return found if family else _shared(found, sources[-1].file)


def _shared(found: list[Parsed], file: TensorFile) -> list[Parsed]:
    """Adapters of unknown family, each with only the candidates that fit all of them."""
    common = tuple(name for name in found[0].candidates if all(name in one.candidates for one in found))
    if not common and any(one.candidates for one in found):
        raise ConversionError(
            "no one family has the modules of all inputs", path=file.path, hint="hubtool explain shows what fits"
        )
    return [replace(one, candidates=common) for one in found]


def _as(family: str | None, parsed: Parsed, file: TensorFile) -> Parsed:
    """An adapter that fits several families, read as the one the others have."""
    if family is None or parsed.adapter.family == family:
        return parsed
    if family not in parsed.candidates:
        told = ", ".join(parsed.candidates) or "no known family"
        raise ConversionError(f"an adapter of {told} beside one of {family}", path=file.path)
    return parse_file(file, family)


def _refuse(adapter: Adapter, file: TensorFile) -> None:
    errors = [finding.message for finding in adapter.findings if finding.severity == "error"]
    if errors:
        raise ConversionError(f"the adapter cannot be merged safely: {errors[0]}", path=file.path)
    if not adapter.patches:
        raise ConversionError("this adapter changes no module", path=file.path, hint=f"hubtool inspect {file.path}")


def _check_strengths(strengths: Sequence[Strengths], adapters: Sequence[Adapter], family: str | None) -> None:
    """Every part of a strength means some module, and no input counts nothing at all."""
    every = [key for adapter in adapters for key in adapter.patches]
    for one, adapter in zip(strengths, adapters, strict=False):
        lost = one.unmatched(every, family)
        if lost:
            parts = ", ".join(dict.fromkeys(component for component, _ in every))
            raise UsageProblem(
                f"no module is called {lost[0]}", hint=f"the adapters change {parts}; hubtool inspect lists"
            )
        known = one.resolved(family)
        if not known.plain and not any(known.of(*key) for key in adapter.patches):
            raise UsageProblem("these strengths leave nothing of an input")


def _naming(layout: str, family: str | None) -> str:
    from hubtool.layouts import tables

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
            patch, how = _made(job, rank, asked)
        patches[job.slot.key] = patch
        if how == "copied" and isinstance(patch, LowRank) and patch.residual is None:
            report.copied[job.slot.name] = patch
        report.modules[job.slot.name] = Module(len(job.slot.patches), job.slot.ranks, patch.rank, how)
    if not patches:
        raise UsageProblem("the budget has no place for a single module")
    return patches


def _made(job: Job, rank: int, asked: Asked) -> tuple[Patch, str]:
    """(the patch at a rank, how it was made). Where a budget leaves a single input's factors whole, they are copied after all."""
    if len(job.slot.patches) == 1 and asked.method.linear and asked.alpha is None:
        ((_, patch),) = job.slot.patches.items()
        if isinstance(patch, LowRank) and patch.mid is None and patch.rank <= rank:
            return terms.strengthened(patch, *job.slot.shares(asked)), "copied"
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


def _adapter(
    adapters: Sequence[Adapter], patches: Mapping[ModuleKey, Patch], family: str | None, report: Report
) -> Adapter:
    extras: dict[str, TensorRef] = {}
    for adapter in adapters:
        again = extras.keys() & adapter.extras.keys()
        report.notes += [f"{key} is not understood; the first input's is kept" for key in sorted(again)]
        extras = {**adapter.extras, **extras}
    return Adapter(
        family=family,
        patches=MappingProxyType(dict(patches)),
        embeddings=_embeddings(adapters, report),
        extras=MappingProxyType(extras),
        metadata=adapters[0].metadata if len(adapters) == 1 else MappingProxyType({}),
    )


def _embeddings(adapters: Sequence[Adapter], report: Report) -> tuple[Embedding, ...]:
    """Token vectors are learned words, not changes: all are kept, of one token's the first input's."""
    found: dict[tuple[str | None, str | None], Embedding] = {}
    for one in (one for adapter in adapters for one in adapter.embeddings):
        known = found.setdefault((one.token, one.encoder), one)
        if known is not one and not same(known.vectors, one.vectors):
            report.notes.append(f"token {one.token}: the first input's vectors are kept")
    return tuple(found.values())


def _plan(sources: Sequence[Source], merged: Adapter, emission: Emission, request: Request, report: Report) -> Plan:
    container = _container(emission, request.format)
    losses: tuple[Loss, ...] = tuple(emission.losses)
    if emission.config and container != "peft-folder":
        losses += tuple(spelling.config_losses(emission.patches, {}))
    metadata = {**carried_metadata(merged.metadata), **emission.metadata, **_network(emission)}
    tensors = {key: _cast(key, tensor, request.dtype) for key, tensor in emission.tensors.items()}
    why = {name: how for name, one in report.modules.items() if (how := _rounded(one))}
    return Plan(
        source=sources[0].file.path,
        format=container,
        layout=str(emission.layout),
        tensors=tensors,
        metadata=metadata if container != "torch-zip" else {},
        tree=list(tensors.values()) if emission.container == "torch-list" else None,
        config=emission.config if container == "peft-folder" else None,
        losses=losses,
        notes=(*emission.notes, *report.notes),
        rounded={**emission.rounded, **why},
    )


def _rounded(one: Module) -> str:
    """Why a module's numbers are not an input's own."""
    return "" if one.how == "copied" else f"{one.how} of {one.inputs} inputs"


def _network(emission: Emission) -> dict[str, str]:
    """What sd-scripts' readers look up: rank and alpha of the network, as resize_lora.py writes them ("Dynamic" for several)."""
    if emission.layout.syntax != "kohya":
        return {}
    patches = [patch for patch in emission.patches.values() if isinstance(patch, LowRank)]
    if not patches:
        return {}
    found = {patch.rank for patch in patches}, {patch.scale * patch.rank for patch in patches}
    dim, alpha = (f"{min(one):g}" if len(one) == 1 else "Dynamic" for one in found)
    convolutions = any(patch.algorithm == "locon" for patch in patches)
    arguments = {"ss_network_args": json.dumps({"conv_dim": dim, "conv_alpha": alpha})} if convolutions else {}
    return {"ss_network_module": "networks.lora", "ss_network_dim": dim, "ss_network_alpha": alpha, **arguments}


def _cast(key: str, tensor: Expr, dtype: str | None) -> Expr:
    """A copied tensor in the wanted dtype; alphas stay."""
    if (
        dtype is None
        or tensor.dtype == dtype
        or tensor.dtype not in FLOATS
        or not tensor.shape
        or key.endswith("alpha")
    ):
        return tensor
    return terms.cast(tensor, dtype)
