"""extract: the difference of two checkpoints as an adapter; recipe and lineage go with the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubtool.actions.outcome import check_output, lossy, recorded
from hubtool.actions.recipe import Hashes, RunOptions
from hubtool.actions.refs import locate
from hubtool.errors import UsageProblem
from hubtool.formats import TensorFile, open_file
from hubtool.ops.execute import execute
from hubtool.ops.extract.request import Request
from hubtool.ops.plan import Plan
from hubtool.ops.recipe import Input, Output, Parent, Recipe, stamp
from hubtool.ops.target import SUFFIXES

if TYPE_CHECKING:
    from hubtool.ops.extract.planning import Task
    from hubtool.ops.extract.report import Report

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Options:
    """How an extraction is carried out. ``library``: where lineage is recorded (a path or URL, None for the default)."""

    allow_loss: bool = False
    force: bool = False
    library: str | None = None


@dataclass(frozen=True, slots=True)
class Extracted:
    """What was done. ``warning``: lineage that could not be recorded."""

    plan: Plan
    report: Report
    recipe: Recipe
    output: Path
    size: int
    bytes_in: int
    warning: str | None = None

    def to_json(self) -> dict[str, Any]:
        document = {**self.plan.to_json(), **self.report.to_json(), "recipe": self.recipe.to_json()}
        document |= {"output": str(self.output), "size": self.size, "bytes_in": self.bytes_in}
        return {**document, "warning": self.warning} if self.warning else document


def prepare(base: str | Path, tuned: str | Path, request: Request, library: str | None = None) -> Task:
    """What ``extract`` would do, as far as headers tell; inputs are paths or REFs of the library.

    Raises what recognising and pairing raise.
    """
    from hubtool.ops.extract import planning
    from hubtool.ops.sides import sides

    request.check()
    paths = [locate(one, library) for one in (base, tuned)]
    first, second = sides([open_file(path) for path in paths], request.family)
    return planning.prepare(first, second, request)


def extract(
    task: Task, output: str | Path, options: Options | None = None, progress: Progress | None = None
) -> Extracted:
    """Carry out what ``prepare`` returned. ``progress`` counts up to ``task.total``.

    Raises ``LossyConversion`` where the layout cannot hold everything, unless that is allowed, and what decomposing and writing raise;
    the output appears whole or not at all.
    """
    from hubtool.ops.extract import planning
    from hubtool.ops.extract.scratch import Scratch

    options, output = options or Options(), Path(output)
    files = task.base.file, task.tuned.file
    check_output(output, [file.path for file in files], replace=options.force and not output.is_dir())
    hashes = Hashes([file.path for file in files])
    with Scratch(output.parent) as scratch:
        plan, report = planning.extract(task, scratch, progress)
        if plan.losses and not options.allow_loss:
            raise lossy(plan, output)
        recipe = recipe_of(task)
        parents = [Parent.of(file, hashes.of(file.path)) for file in files]
        plan = stamp(plan, recipe, parents)
        size = execute(plan, output, force=options.force, workers=task.request.workers, device=task.request.device)
    warning = _record(output, files, task.request, options.library)
    return Extracted(plan, report, recipe, output, size, sum(file.size for file in files), warning)


def format_of(output: str | Path) -> str | None:
    """The container that a file name asks for; None where the layout decides."""
    return SUFFIXES.get(Path(output).suffix.lower())


def recipe_of(task: Task) -> Recipe:
    """The recipe that repeats this extraction."""
    request = task.request
    named = zip((task.base.file, task.tuned.file), ("base", "tuned"), strict=True)
    return Recipe(
        operation="extract",
        inputs=tuple(Input(path=str(file.path), role=role, family=request.family) for file, role in named),
        method=request.kind,
        parameters=request.parameters(),
        output=Output(layout=request.layout, format=request.format, dtype=request.dtype),
        seed=request.seed,
    )


def run_recipe(
    recipe: Recipe, inputs: list[Path], output: Path | None, options: RunOptions, progress: Progress | None = None
) -> Extracted | Task:
    """Carry out a recipe whose operation is ``extract``; the task alone for a dry run. Raises ``UsageProblem`` without base and tuned."""
    roles = dict(zip((one.role for one in recipe.inputs), inputs, strict=True))
    if roles.keys() != {"base", "tuned"}:
        raise UsageProblem("an extraction has two inputs, of the roles base and tuned")
    family = next((one.family for one in recipe.inputs if one.family), None)
    wanted = Request.of(
        recipe.parameters, kind=recipe.method, layout=recipe.output.layout, dtype=recipe.output.dtype, family=family,
        format=recipe.output.format, seed=recipe.seed, device=options.device, workers=options.workers,
    )  # fmt: skip
    task = prepare(roles["base"], roles["tuned"], wanted)
    if options.dry_run or output is None:
        return task
    return extract(task, output, Options(force=options.force, library=options.library), progress)


def _record(output: Path, files: tuple[TensorFile, ...], request: Request, library: str | None) -> str | None:
    return recorded(library, output, [file.path for file in files], "extract", request.parameters())
