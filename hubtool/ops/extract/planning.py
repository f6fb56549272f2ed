"""From two checkpoints to the plan of an adapter and the report of what it holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hubtool.adapters.dense import Dense
from hubtool.adapters.ir import Adapter, ModuleKey, Patch
from hubtool.adapters.low_rank import LowRank
from hubtool.errors import ConversionError
from hubtool.layouts.emission import Loss
from hubtool.layouts.emit import emit
from hubtool.ops.adapters import container_of
from hubtool.ops.containers import config_losses
from hubtool.ops.extract import changes, metadata
from hubtool.ops.extract.factors import Decomposed, decompose, memory
from hubtool.ops.extract.pairing import Pair, Pairs, pair
from hubtool.ops.extract.pool import Progress, Room
from hubtool.ops.extract.report import Component, Module, Report
from hubtool.ops.extract.request import DTYPES, Request
from hubtool.ops.extract.scratch import Scratch
from hubtool.ops.extract.spectrum import within
from hubtool.ops.extract.units import Sorted, Unit, sort
from hubtool.ops.factor_space.budget import ranks as ranks_of
from hubtool.ops.plan import Plan
from hubtool.ops.quantised import refuse_quantised
from hubtool.ops.sides import ParameterKey, Side
from hubtool.tensors import expr as e
from hubtool.tensors.dtypes import BITS, numel
from hubtool.tensors.expr import Cols, Expr

_HEADER = 150  # bytes of the JSON header that a tensor takes, about
_METADATA = 4000  # bytes of what the output says about itself, about


@dataclass(frozen=True, slots=True)
class Task:
    """Everything that headers tell about an extraction."""

    base: Side
    tuned: Side
    pairs: Pairs
    sorted: Sorted
    request: Request

    @property
    def total(self) -> int:
        """What progress counts up to."""
        return sum(memory(unit, self.request) for unit in self.sorted.units)

    def to_json(self) -> dict[str, Any]:
        """What ``--dry-run`` knows: at most these modules, before a number was read."""
        counts: dict[str, int] = {}
        for unit in self.sorted.units:
            counts[unit.component] = counts.get(unit.component, 0) + len(unit.parts)
        return {
            "family": self.pairs.family,
            "layout": self.request.layout,
            "modules": counts,
            "differences": len(self.sorted.dense),
            "bytes_at_most": _largest(self),
            "bytes_in": 2 * sum(e.size(unit.base) for unit in self.sorted.units),
            "left_out": {reason: len(keys) for reason, keys in self.sorted.left.items()},
            "only_base": len(self.pairs.only_base),
            "only_tuned": len(self.pairs.only_tuned),
        }


def prepare(base: Side, tuned: Side, request: Request) -> Task:
    """What there is to do; only headers were read. Raises ``UsageProblem``, ``ShapeMismatch``, ``Unsupported``, ``ConversionError``."""
    request.check()
    for one in (base, tuned):
        refuse_quantised(one.file, one.source.tensors)
    pairs = pair(base, tuned)
    found = sort(pairs, request)
    if not found.units and not found.dense:
        text = "nothing of these checkpoints is to be extracted"
        raise ConversionError(text, path=tuned.file.path, hint="; ".join(found.left) or None)
    return Task(base, tuned, pairs, found, request)


def extract(
    task: Task, scratch: Scratch, progress: Progress | None = None, *, empty: bool = False
) -> tuple[Plan, Report]:
    """Decompose every module that changed. The plan's tensors lie on ``scratch``: execute it before that is closed.

    Raises ``ConversionError`` when nothing changed, ``BadValues`` naming a tensor with NaN or infinity. ``empty``: where nothing changed
    the plan has no tensors, instead of the error.
    """
    found = decompose(task.sorted.units, task.request, scratch, progress)
    changed = [one for one in found if one is not None]
    room = Room(task.request.device)
    with room.sources:
        dense = {key: both for key, both in task.sorted.dense.items() if changes.differ(*both, room)}
        left = {reason: changes.changed(task.pairs, keys, room) for reason, keys in task.sorted.left.items()}
    ranks = _ranks(changed, task.request, _reserved(task, dense))
    kept = [(one, rank) for one, rank in zip(changed, ranks, strict=True) if rank]
    nothing = not kept and not dense
    if nothing and (changed or not empty):
        raise _nothing(task, bool(changed))
    report = _report(task, found, kept, dense, left)
    if nothing:
        return Plan(task.tuned.file.path, task.request.format or "safetensors", None, {}), report
    return _plan(task, kept, dense, report), report


def _nothing(task: Task, changed: bool) -> ConversionError:
    name = task.tuned.file.path.name
    if changed:
        return ConversionError(f"no rank of any module of {name} fits into the size", hint="give a larger --budget")
    text = f"{name} does not differ from {task.base.file.path.name} in anything that is extracted"
    return ConversionError(text, path=task.tuned.file.path, hint="hubtool diff shows where they differ")


def _reserved(task: Task, dense: Mapping[ParameterKey, Pair]) -> int:
    """Bytes of the output beside its factors: differences, and a header with what the parents say about themselves."""
    width = BITS[DTYPES[task.request.dtype]] // 8
    differences = sum(width * numel(both[0].shape) + _HEADER for both in dense.values())
    said = (task.base.file.metadata, task.tuned.file.metadata)
    return differences + _METADATA + sum(2 * len(key) + 2 * len(text) for one in said for key, text in one.items())


def _ranks(changed: Sequence[Decomposed], request: Request, reserved: int) -> list[int]:
    """The rank of each module. A size is kept with names, alphas and ``reserved`` bytes counted in."""
    if request.budget.size is not None:
        overhead = [3 * _HEADER + 4 for _ in changed]
        spectra = [one.spectrum for one in changed]
        return within(spectra, request.budget.size - reserved, [_cost(one, request) for one in changed], overhead)
    keyed = dict(enumerate(changed))
    spectra_by = {i: one.spectrum for i, one in keyed.items()}
    if not request.budget.needs_spectra:
        return [len(one.spectrum.values) for one in changed]
    found = ranks_of(spectra_by, {i: _cost(one, request) for i, one in keyed.items()}, request.budget)
    return [found[i] for i in keyed]


def _cost(one: Decomposed, request: Request) -> int:
    return sum(one.unit.sizes) * BITS[DTYPES[request.dtype]] // 8


def _plan(
    task: Task, kept: Sequence[tuple[Decomposed, int]], dense: Mapping[ParameterKey, Pair], report: Report
) -> Plan:
    stored = DTYPES[task.request.dtype]
    patches = dict(_ordered(task, dict(low_rank(kept)), dense, stored))
    emission = emit(Adapter(task.pairs.family, MappingProxyType(patches)), task.request.layout)
    container = container_of(emission, task.request.format)
    losses: tuple[Loss, ...] = tuple(emission.losses)
    if emission.config and container != "peft-folder":
        losses += tuple(config_losses(emission.patches, {}))
    said = metadata.describe(task.base, task.tuned, report.modules, task.request.dtype)
    return Plan(
        source=task.base.file.path,
        format=container,
        layout=str(emission.layout),
        tensors=emission.tensors,
        metadata={} if container == "torch-zip" else {**said, **emission.metadata},
        tree=list(emission.tensors.values()) if emission.container == "torch-list" else None,
        config=emission.config if container == "peft-folder" else None,
        losses=losses,
        notes=tuple(emission.notes),
        rounded=emission.rounded,
    )


def low_rank(kept: Iterable[tuple[Decomposed, int]]) -> Iterator[tuple[ModuleKey, LowRank]]:
    """A patch for every module; modules of one unit share ``down``."""
    for one, rank in kept:
        unit = one.unit
        whole = len(one.spectrum.values)
        up = one.up if rank == whole else Cols(one.up, 0, rank)
        up = e.reshape(up, (unit.shape[0], rank, *(1,) * (len(unit.shape) - 2)))
        down = e.reshape(e.rows(one.down, 0, rank), (rank, *unit.shape[1:]))
        start = 0
        for part, count in zip(unit.parts, unit.rows, strict=True):
            yield (unit.component, part), LowRank(e.rows(up, start, start + count), down, alpha_value=float(rank))
            start += count


def _ordered(
    task: Task, patches: Mapping[ModuleKey, LowRank], dense: Mapping[ParameterKey, Pair], stored: str
) -> Iterator[tuple[ModuleKey, Patch]]:
    """Every patch in the order of the tuned checkpoint."""
    differences: dict[ModuleKey, dict[str, Expr]] = {}
    for key, both in dense.items():
        component, parameter = key
        module, _, own = parameter.rpartition(".")
        differences.setdefault((component, module), {})[own] = changes.difference(*both, stored)
    order = dict.fromkeys((component, name.rpartition(".")[0]) for component, name in task.pairs.common)
    for module_key in order:
        patch = patches.get(module_key)
        rest = differences.get(module_key, {})
        if patch is not None:
            yield module_key, LowRank(patch.up, patch.down, alpha_value=patch.alpha_value, diff_b=rest.get("bias"))
        elif rest:
            yield module_key, _dense(rest, _norm(task, module_key))


def _norm(task: Task, key: ModuleKey) -> bool:
    component, module = key
    both = task.pairs.common.get((component, f"{module}.weight"))
    return both is not None and len(both[0].shape) == 1


def _dense(rest: Mapping[str, Expr], norm: bool) -> Dense:
    weight, bias = rest.get("weight"), rest.get("bias")
    return Dense(w_norm=weight, b_norm=bias) if norm else Dense(diff=weight, diff_b=bias)


def _report(
    task: Task,
    found: Sequence[Decomposed | None],
    kept: Sequence[tuple[Decomposed, int]],
    dense: Mapping[ParameterKey, Pair],
    left: Mapping[str, list[str]],
) -> Report:
    modules = tuple(Module.of(one.unit.name, one.unit.shape, rank, one.spectrum) for one, rank in kept)
    target = None if task.request.budget.across else task.request.budget.target
    return Report(
        family=task.pairs.family,
        modules=modules,
        dense=tuple(".".join(key) for key in dense),
        components=_components(task, found, dense),
        left={reason: names for reason, names in left.items() if names},
        only_base=tuple(".".join(key) for key in task.pairs.only_base),
        only_tuned=tuple(".".join(key) for key in task.pairs.only_tuned),
        missed=tuple(one.name for one in modules if target is not None and one.error > target * 1.001),
    )


def _components(
    task: Task, found: Sequence[Decomposed | None], dense: Mapping[ParameterKey, Pair]
) -> dict[str, Component]:
    counts = {name: [0, 0] for name in task.pairs.components()}
    for unit, one in zip(task.sorted.units, found, strict=True):
        counts[unit.component][one is None] += len(unit.parts)
    for key in task.sorted.dense:
        counts[key[0]][key not in dense] += 1
    return {name: Component(changed, unchanged) for name, (changed, unchanged) in counts.items()}


def _largest(task: Task) -> int:
    """Bytes of the output when everything changed and every module got all its ranks."""
    width = BITS[DTYPES[task.request.dtype]] // 8
    low_rank = sum(_rank(unit, task.request) * sum(unit.sizes) for unit in task.sorted.units)
    whole = width * (low_rank + sum(numel(both[0].shape) for both in task.sorted.dense.values()))
    return whole if task.request.budget.size is None else min(whole, task.request.budget.size)


def _rank(unit: Unit, request: Request) -> int:
    return min(request.most(unit.convolution), *unit.sizes)
