"""Checkpoints n -> 1, by any method, per component and per block; inputs in any containers and layouts, output in those of the first.

made, report = plan([open_file("a.safetensors"), open_file("b-folder/")], Request(strengths=(parse(["0.3"]),)))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from hubtool.errors import ConversionError, UsageProblem
from hubtool.formats.base import TensorFile
from hubtool.layouts import checkpoints
from hubtool.layouts.receipt import KEY as RECEIPT
from hubtool.ops import sides as side_by_side
from hubtool.ops.checkpoint_merge import shares
from hubtool.ops.checkpoint_merge.merging import Merger
from hubtool.ops.checkpoints import written
from hubtool.ops.collapse import output
from hubtool.ops.collapse.base import Base
from hubtool.ops.methods import Method, find
from hubtool.ops.plan import Plan
from hubtool.ops.quantised import refuse_quantised
from hubtool.ops.sides import Side
from hubtool.ops.strengths import Strengths
from hubtool.ops.target import DTYPES, Target
from hubtool.tensors.dtypes import FLOATS
from hubtool.tensors.expr import Expr, Read

_DTYPES = MappingProxyType({**DTYPES, "fp8": "F8_E4M3", "fp8_e4m3": "F8_E4M3", "fp8_e5m2": "F8_E5M2"})
_WANTED = ("fp16", "bf16", "fp32", "fp8_e4m3", "fp8_e5m2")


@dataclass(frozen=True, slots=True)
class Request:
    """How to merge. ``strengths``: of the inputs in their order, see ``checkpoint_merge.shares``; ``dtype``, ``layout``, ``container``
    (``safetensors`` or ``torch-zip``): None keeps the first input's."""

    method: str = "weighted_sum"
    strengths: tuple[Strengths | None, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    family: str | None = None
    dtype: str | None = None
    layout: str | None = None
    container: str | None = None
    seed: int = 0


@dataclass(slots=True)
class Report:
    """What a merge does with the first input's tensors. ``kept``: those that another input lacks (copied), by that input;
    ``spare``: tensors of the other inputs that the first does not have; ``extras``: the first's own buffers and EMA copies, copied."""

    method: str
    inputs: list[dict[str, Any]]
    merged: Counter[str] = field(default_factory=Counter)
    copied: Counter[str] = field(default_factory=Counter)
    kept: dict[str, list[str]] = field(default_factory=dict)
    spare: dict[str, list[str]] = field(default_factory=dict)
    extras: int = 0

    @property
    def matched(self) -> int:
        """Tensors that every input has."""
        return self.merged.total() + self.copied.total()

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "inputs": self.inputs,
            "matched": self.matched,
            "merged": dict(self.merged),
            "copied": dict(self.copied),
            "unmatched": self.kept,
            "only_in_others": self.spare,
            "extras": self.extras,
        }


def plan(files: Sequence[TensorFile], request: Request, base: TensorFile | None = None) -> tuple[Plan, Report]:
    """What merging ``files`` will write, and what becomes of every tensor. Only headers are read.

    Raises ``UsageProblem`` for what the method does not take, ``ConversionError`` where families differ or nothing matches,
    ``ShapeMismatch`` naming module and shapes, ``Unsupported`` for quantised weights.
    """
    method = find(request.method)
    method.check_inputs(len(files), base=base is not None)
    if method.base == "required" and base is None:
        raise UsageProblem(f"method {method.id} needs a base", hint="name what the inputs were made from with --base")
    sides = side_by_side.sides([*files, *([] if base is None else [base])], request.family)
    for one in sides:
        refuse_quantised(one.file, one.source.tensors)
    strengths = _resolved(request.strengths, len(files), method, sides[0])
    merger = _merger(request, method, sides, len(files), strengths)
    report = Report(method.id, [side.to_json() for side in sides])
    first = sides[0]
    tensors = _merged(first, merger, report)
    if not report.matched:
        raise ConversionError(
            "nothing matches: no weight of the first input is in all others",
            hint=f"hubtool explain {sides[1].file.path}",
        )
    _account(sides, report, strengths)
    made = _output(first, tensors, request)
    return replace(made, rounded=_rounding(made, request), notes=(*made.notes, *_notes(report))), report


def _resolved(given: shares.Given, count: int, method: Method, first: Side) -> list[Strengths | None]:
    arranged = shares.arranged(given, count, method)
    return [None if one is None else one.resolved(first.family) for one in arranged]


def _merger(
    request: Request, method: Method, sides: Sequence[Side], count: int, strengths: list[Strengths | None]
) -> Merger:
    def weights(component: str, path: str) -> tuple[float, ...]:
        return shares.weights(strengths, component, path, method)

    return Merger(
        method,
        tuple(method.checked(request.parameters).items()),
        sides[0],
        tuple(sides[1:count]),
        sides[count] if len(sides) > count else None,
        weights,
        _dtype(request.dtype),
        request.seed,
    )


def _dtype(name: str | None) -> str | None:
    if name is None:
        return None
    if name.lower() not in _DTYPES:
        raise UsageProblem(f"no such dtype: {name}", hint=f"one of {', '.join(_WANTED)}")
    return _DTYPES[name.lower()]


def _merged(first: Side, merger: Merger, report: Report) -> dict[str, Expr]:
    """Stored key of the first input -> what it becomes; tensors that stay are left out."""
    homes = checkpoints.homes(first.source.tensors, first.source.pipeline, first.source.slots)
    changed: dict[str, Expr] = {}
    for key, ref in first.source.tensors.items():
        own, home = Read(ref), homes.get(key)
        made: Expr = merger.cast(own) if home is not None else own
        if home is None:
            report.extras += 1
        elif ref.dtype in FLOATS:
            rest = merger.counterparts(home, ref.shape)
            if rest is None:
                for side in merger.lacking(home, ref.shape):
                    report.kept.setdefault(side.file.path.name, []).append(key)
            else:
                made = merger.merged(key, own, rest, home)
                (report.copied if made is own else report.merged)[home.component] += 1
        if made is not own:
            changed[key] = made
    return changed


def _account(sides: Sequence[Side], report: Report, strengths: Sequence[Strengths | None]) -> None:
    first = sides[0]
    for side in sides[1:]:
        own = (
            f"{name}.{key}"
            for name, keys in side.checkpoint.weights.items()
            for key in keys
            if first.tensor(name, key) is None
        )
        spare = list(own)
        if spare:
            report.spare[side.file.path.name] = spare
    modules = [(name, key.rpartition(".")[0]) for name, keys in first.checkpoint.weights.items() for key in keys]
    unused = sorted({text for one in strengths if one is not None for text in one.unmatched(modules)})
    if unused:
        raise UsageProblem(
            f"no module answers to the strength of {unused[0]!r}",
            hint=f"components: {', '.join(first.checkpoint.weights)}",
        )


def _output(first: Side, changed: Mapping[str, Expr], request: Request) -> Plan:
    base = Base(first.file, first.family)
    if request.layout is None:
        made = output.plan(base, changed, request.container)
        return replace(made, metadata={key: value for key, value in made.metadata.items() if key != output.HEADER})
    tensors: dict[str, Expr] = {key: changed.get(key, Read(ref)) for key, ref in first.source.tensors.items()}
    checkpoint = checkpoints.read(tensors, first.source.pipeline, first.source.slots)
    plain = {
        key: value for key, value in first.file.metadata.items() if key != RECEIPT
    }  # what it remembers is not what this is
    target = Target(layout=request.layout, format=request.container)
    return written(replace(first.file, metadata=plain), first.source, checkpoint, request.layout, target)


def _rounding(made: Plan, request: Request) -> dict[str, str]:
    count = Counter(tensor.dtype for tensor in made.tensors.values() if not isinstance(tensor, Read))
    return {f"{n} {dtype} tensors": f"merged in fp32, rounded once to {dtype}" for dtype, n in sorted(count.items())}


def _notes(report: Report) -> list[str]:
    notes = [
        f"{name} lacks {len(keys)} tensors, which stay as they are (first {keys[0]})"
        for name, keys in report.kept.items()
    ]
    notes += [
        f"{name} has {len(keys)} tensors more, which are left out (first {keys[0]})"
        for name, keys in report.spare.items()
    ]
    return notes if report.merged else [*notes, "strengths of 0 leave every tensor as it is"]
