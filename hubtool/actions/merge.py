"""merge: adapters or checkpoints as one, told apart by what the inputs are; recipe and lineage go with the output."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from hubtool.actions import outcome
from hubtool.actions.late_hashes import LARGE, LateHashes
from hubtool.actions.merge_kinds import kind_of
from hubtool.actions.outcome import check_output, lossy, recorded
from hubtool.actions.recipe import RunOptions
from hubtool.actions.refs import locate
from hubtool.errors import UsageProblem
from hubtool.formats import open_file
from hubtool.formats.base import TensorFile
from hubtool.ops import merge_adapters, merge_checkpoints
from hubtool.ops import recipe as recipes
from hubtool.ops.checkpoint_merge.shares import spread
from hubtool.ops.execute import execute
from hubtool.ops.factor_space.blend import Space
from hubtool.ops.factor_space.budget import Budget
from hubtool.ops.factor_space.report import Report as AdapterReport
from hubtool.ops.plan import Plan
from hubtool.ops.recipe import Input, Output, Parent, Recipe
from hubtool.ops.strengths import Strengths, parse
from hubtool.ops.target import SUFFIXES
from hubtool.tensors.device import check_device

Progress = Callable[[int], None]
Report: TypeAlias = "AdapterReport | merge_checkpoints.Report"
Planned: TypeAlias = tuple[Plan, "Report"]
DEFAULTS = MappingProxyType({"adapter": "linear", "checkpoint": "weighted_sum"})
_BUDGET = ("rank", "energy", "error", "size", "across", "max_rank")


@dataclass(frozen=True, slots=True)
class Options(outcome.Options):
    """How a merge is carried out; what every verb has stands in ``outcome.Options``.

    ``method``: None for the weighted sum. ``strengths`` and ``blocks``: texts for the inputs in their order, see
    ``ops.checkpoint_merge.shares``; an input may bring its own. ``budget``, ``space``, ``alpha``: of adapters only. ``container``: None for
    the output's suffix, else the first input's. ``steps``: so many results from the first input to the second, into the folder ``output``.
    ``hashes``: fingerprints of large inputs, too, go into the recipe.
    """

    method: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    base: str | None = None
    strengths: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    budget: Budget = field(default_factory=Budget)
    space: Space = "dense"
    alpha: float | None = None
    layout: str | None = None
    container: str | None = None
    dtype: str | None = None
    family: str | None = None
    component: str | None = None
    seed: int = 0
    steps: int | None = None
    hashes: bool = False


@dataclass(frozen=True, slots=True)
class Merged:
    """What was done. ``kind``: ``adapter`` or ``checkpoint``; ``output`` is None for a dry run; ``warning``: lineage that failed."""

    kind: str
    plan: Plan
    report: Report
    output: Path | None
    size: int
    recipe: Recipe
    warning: str | None = None

    def to_json(self) -> dict[str, Any]:
        document = {"kind": self.kind, **self.plan.to_json(), **self.report.to_json(), "recipe": self.recipe.to_json()}
        document |= {"output": None if self.output is None else str(self.output), "size": self.size}
        return document | ({"warning": self.warning} if self.warning else {})


@dataclass(frozen=True, slots=True)
class _Job:
    """The opened inputs, the base last if there is one."""

    kind: str
    files: tuple[TensorFile, ...]
    inputs: tuple[Input, ...]
    options: Options
    output: Path | None

    @property
    def based(self) -> bool:
        return self.inputs[-1].role == "base"

    @property
    def count(self) -> int:
        """Inputs without the base."""
        return len(self.inputs) - self.based

    @property
    def method(self) -> str:
        return self.options.method or DEFAULTS[self.kind]

    @property
    def container(self) -> str | None:
        if self.options.container is not None or self.output is None or self.options.steps is not None:
            return self.options.container
        return SUFFIXES.get(self.output.suffix.lower())

    @property
    def layout(self) -> str | None:
        """A folder that is merged into one file becomes its family's single file."""
        folder = self.kind == "checkpoint" and self.files[0].format == "diffusers-folder"
        single = folder and self.options.layout is None and self.container is not None
        return "single-file" if single else self.options.layout


def merge(
    inputs: Sequence[Input], output: str | Path | None, options: Options | None = None, progress: Progress | None = None
) -> list[Merged]:
    """Merge ``inputs`` (path or REF, strengths) and write ``output``; one result, or ``options.steps`` of them in a folder.

    Raises ``UsageProblem``, ``ConversionError`` and its kin for what cannot be merged, ``BadValues`` for NaN, and what opening and writing
    raise; each output appears whole or not at all.
    """
    options = options or Options()
    if output is None and not options.dry_run:
        raise UsageProblem("no output is named", hint="give -o OUT or --dry-run")
    check_device(options.device)
    job = _job(inputs, None if output is None else Path(output), options)
    _check_output(job)
    if options.steps is not None:
        return list(_steps(job, progress))
    return [_one(job, _plan(job), job.output, progress)]


def _job(inputs: Sequence[Input], output: Path | None, options: Options) -> _Job:
    base = () if options.base is None else (Input(path=options.base, role="base"),)
    every = (*_spread(inputs, options), *base)
    files = tuple(open_file(locate(one.path or one.ref or "", options.library)) for one in every)
    kind = kind_of(files)
    named = (
        replace(one, path=str(file.path), ref=None, role=one.role or kind)
        for one, file in zip(every, files, strict=True)
    )
    return _Job(kind, files, tuple(named), options, output)


def _spread(inputs: Sequence[Input], options: Options) -> list[Input]:
    """The texts of ``--strength`` and ``--blocks`` given to the inputs they are meant for: all, all but the first, or one text for all."""
    count = len(inputs)
    strengths, blocks = (spread(texts, count) for texts in (options.strengths, options.blocks))
    rows = zip(inputs, strengths, blocks, strict=True)
    return [
        replace(one, strengths=(*one.strengths, *([] if text is None else [text])), blocks=block or one.blocks)
        for one, text, block in rows
    ]


def _check_output(job: _Job) -> None:
    output = job.output
    if output is None or job.options.dry_run:
        return
    check_output(output, [file.path for file in job.files], replace=job.options.force)


def _plan(job: _Job) -> Planned:
    return _checkpoints(job) if job.kind == "checkpoint" else merge_adapters.plan(*_adapters(job))


def _adapters(job: _Job) -> tuple[list[merge_adapters.Source], merge_adapters.Request, merge_adapters.Source | None]:
    sources = [
        merge_adapters.Source(file, strengths_of(one) or Strengths())
        for file, one in zip(job.files, job.inputs, strict=True)
    ]
    names = ("parameters", "budget", "space", "dtype", "alpha", "family", "component", "seed", "workers")
    request = merge_adapters.Request(
        method=job.method,
        layout=job.layout,
        format=job.container,
        **{name: getattr(job.options, name) for name in names},
    )
    return sources[: job.count], request, sources[-1] if job.based else None


def _checkpoints(job: _Job) -> Planned:
    options = job.options
    _refuse_adapter_options(options)
    request = merge_checkpoints.Request(
        method=job.method,
        strengths=_given(job),
        parameters=options.parameters,
        family=options.family,
        dtype=options.dtype,
        layout=job.layout,
        container=job.container,
        seed=options.seed,
    )
    return merge_checkpoints.plan(job.files[: job.count], request, job.files[-1] if job.based else None)


def _given(job: _Job) -> tuple[Strengths | None, ...]:
    own = tuple(strengths_of(one) for one in job.inputs[: job.count])
    return own if any(one is not None for one in own) else ()


def _refuse_adapter_options(options: Options) -> None:
    if options.budget != Budget() or options.space != "dense" or options.alpha is not None:
        raise UsageProblem(
            "ranks are of adapters, and these are checkpoints",
            hint="leave out --rank, --energy, --error, --budget, --space",
        )
    if options.component is not None:
        raise UsageProblem(
            "a component of checkpoints is chosen by strengths", hint=f"--strength 0,{options.component}=1"
        )


def strengths_of(one: Input) -> Strengths | None:
    """The strengths that an input of a recipe states; None where it says nothing."""
    silent = one.strength is None and not one.strengths and one.blocks is None
    return None if silent else parse(one.strengths, one.blocks, one.strength)


def _steps(job: _Job, progress: Progress | None) -> Iterator[Merged]:
    """Results from the first input to the second, in a folder of their own; each is a merge of its own, with its own recipe."""
    count = job.options.steps or 0
    if job.count != 2 or count < 2:
        raise UsageProblem("steps lead from one input to another", hint="name two inputs, and at least 2 steps")
    if job.output is not None and not job.options.dry_run:
        job.output.mkdir(exist_ok=job.options.force)
    for index in range(count):
        t = index / (count - 1)
        shares = (_times(one, share) for one, share in zip(job.inputs, (1 - t, t), strict=False))
        inputs = (*shares, *job.inputs[job.count :])
        step = replace(job, inputs=inputs)
        name = (
            None
            if job.output is None
            else job.output / f"step-{index:0{len(str(count - 1))}}-of-{count - 1}{_suffix(job)}"
        )
        yield _one(step, _plan(step), name, progress)


def _times(one: Input, share: float) -> Input:
    if one.strengths or one.blocks is not None:
        raise UsageProblem("steps are between whole inputs", hint="leave out strengths of components and blocks")
    return replace(one, strength=(1.0 if one.strength is None else one.strength) * share)


def _suffix(job: _Job) -> str:
    folder = job.kind == "checkpoint" and job.files[0].format == "diffusers-folder" and job.container is None
    return (
        ""
        if folder or job.files[0].format == "peft-folder"
        else ".pt"
        if job.container == "torch-zip"
        else ".safetensors"
    )


def _one(job: _Job, planned: Planned, output: Path | None, progress: Progress | None) -> Merged:
    made, report = planned
    options = job.options
    if made.losses and not options.allow_loss:
        raise lossy(made)
    recipe = _recipe(job, made)
    if options.dry_run or output is None:
        return Merged(job.kind, made, report, None, made.bytes_out, recipe)
    late = _late(job)
    stamped = recipes.stamp(made, recipe, [Parent.of(file, late.mark(file.path)) for file in job.files])
    size = execute(
        stamped, output, force=options.force, progress=progress, workers=options.workers, device=options.device, late=late.complete
    )  # fmt: skip
    return Merged(job.kind, stamped, report, output, size, recipe, _record(job, recipe, output))


def _late(job: _Job) -> LateHashes:
    """Fingerprints of the inputs, but for large ones that nobody asked for."""
    known = {file.path: one.sha256 for file, one in zip(job.files, job.inputs, strict=True)}
    wanted = (file for file in job.files if job.options.hashes or _size(file) <= LARGE)
    return LateHashes([file.path for file in wanted], known)


def _size(file: TensorFile) -> int:
    return sum(os.stat(path).st_size for path in file.files or (file.path,))


def _recipe(job: _Job, made: Plan) -> Recipe:
    """The recipe that repeats this merge."""
    options = job.options
    limits = {name: value for name in _BUDGET if (value := getattr(options.budget, name)) not in (None, False)}
    others = {
        "space": options.space if options.space != "dense" else None,
        "alpha": options.alpha,
        "component": options.component,
    }
    parameters = {
        **options.parameters,
        **limits,
        **{name: value for name, value in others.items() if value is not None},
    }
    inputs = job.inputs
    if options.family is not None:
        inputs = tuple(replace(one, family=options.family) for one in inputs)
    return Recipe(
        operation="merge",
        inputs=inputs,
        method=job.method,
        parameters=parameters,
        output=Output(layout=job.layout, format=made.format, dtype=options.dtype),
        seed=options.seed,
    )


def _record(job: _Job, recipe: Recipe, output: Path) -> str | None:
    return recorded(
        job.options.library, output, [file.path for file in job.files], "merge", {"recipe": recipe.to_json()}
    )


def run_recipe(
    recipe: Recipe, inputs: Sequence[Path], output: Path | None, options: RunOptions, progress: Progress | None = None
) -> Merged:
    """Carry out a merge that a recipe asks for; the input of role ``base`` is the base, wherever it stands."""
    rows = list(zip(recipe.inputs, inputs, strict=True))
    merged = [replace(one, path=str(path), ref=None) for one, path in rows if one.role != "base"]
    bases = [str(path) for one, path in rows if one.role == "base"]
    if len(bases) > 1:
        raise UsageProblem(f"a merge has one base, the recipe names {len(bases)}")
    given = dict(recipe.parameters)
    budget = Budget(**{name: given.pop(name) for name in _BUDGET if name in given})
    own = {name: given.pop(name) for name in ("space", "alpha", "component") if name in given}
    container = recipe.output.format if recipe.output.format in SUFFIXES.values() else None
    asked = Options(
        method=recipe.method,
        parameters=given,
        base=bases[0] if bases else None,
        budget=budget,
        layout=recipe.output.layout,
        container=container,
        dtype=recipe.output.dtype,
        family=next((one.family for one in recipe.inputs if one.family), None),
        seed=recipe.seed or 0,
        force=options.force,
        dry_run=options.dry_run,
        library=options.library,
        device=options.device,
        workers=options.workers,
        **own,
    )
    return merge(merged, output, asked, progress)[0]
