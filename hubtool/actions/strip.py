"""strip: take EMA copies, training state or components out of a file, or cast it; recipe and lineage go with the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubtool.actions.outcome import lossy, recorded
from hubtool.actions.recipe import Hashes, RunOptions
from hubtool.actions.refs import locate
from hubtool.errors import UsageProblem
from hubtool.formats import open_file
from hubtool.ops.execute import execute
from hubtool.ops.plan import Plan
from hubtool.ops.recipe import Input, Output, Parent, Recipe, stamp
from hubtool.ops.strip import planning
from hubtool.ops.strip.planning import Report, Request
from hubtool.ops.target import SUFFIXES

__all__ = ["Options", "Stripped", "format_of", "run_recipe", "strip"]

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Options:
    """How a strip is carried out, as ``actions.outcome.Options``; without a device: casting costs less than the way to one and back."""

    allow_loss: bool = False
    force: bool = False
    dry_run: bool = False
    library: str | None = None
    workers: int | None = None


@dataclass(frozen=True, slots=True)
class Stripped:
    """What was done. ``output`` is None for a dry run; ``warning``: lineage that could not be recorded."""

    plan: Plan
    report: Report
    recipe: Recipe
    output: Path | None
    size: int
    warning: str | None = None

    def to_json(self) -> dict[str, Any]:
        document = {**self.plan.to_json(), **self.report.to_json(), "recipe": self.recipe.to_json()}
        document |= {"output": None if self.output is None else str(self.output), "size": self.size}
        return {**document, "warning": self.warning} if self.warning else document


def strip(
    source: str | Path,
    output: str | Path | None,
    request: Request,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Stripped:
    """Write ``source`` (a path or REF) without what ``request`` names. The container is ``request.format``, else the source's own.

    Raises ``UsageProblem`` for components that are not there, ``ConversionError`` when nothing would be removed, ``BadValues`` where a
    cast overflows, ``LossyConversion`` unless losses are allowed, ``WouldOverwrite``; the output appears whole or not at all.
    """
    options = options or Options()
    file = open_file(locate(source, options.library))
    plan, report = planning.plan(file, request)
    recipe = _recipe(file.path, request)
    if plan.losses and not options.allow_loss:
        raise lossy(plan, file.path)
    if options.dry_run:
        return Stripped(plan, report, recipe, None, plan.bytes_out)
    if output is None:
        raise UsageProblem("no output is named", hint="give -o OUT")
    plan = stamp(plan, recipe, [Parent.of(file, Hashes([file.path]).of(file.path))])
    size = execute(plan, Path(output), force=options.force, progress=progress, workers=options.workers)
    return Stripped(
        plan, report, recipe, Path(output), size, _record(Path(output), file.path, request, options.library)
    )


def format_of(output: str | Path | None) -> str | None:
    """The container that a file name asks for; None where the source's own is kept."""
    return None if output is None else SUFFIXES.get(Path(output).suffix.lower())


def _recipe(path: Path, request: Request) -> Recipe:
    return Recipe(
        operation="strip",
        inputs=(Input(path=str(path), family=request.family),),
        parameters=request.parameters(),
        output=Output(format=request.format, dtype=request.dtype),
    )


def run_recipe(
    recipe: Recipe, inputs: list[Path], output: Path | None, options: RunOptions, progress: Progress | None = None
) -> Stripped:
    """Carry out a recipe whose operation is ``strip``. Raises ``UsageProblem`` for more than one input."""
    if len(inputs) != 1:
        raise UsageProblem("a strip has one input")
    wanted = Request.of(
        recipe.parameters, dtype=recipe.output.dtype, format=recipe.output.format, family=recipe.inputs[0].family
    )
    own = {name: getattr(options, name) for name in ("force", "dry_run", "library", "workers")}
    return strip(inputs[0], output, wanted, Options(**own), progress)


def _record(output: Path, source: Path, request: Request, library: str | None) -> str | None:
    return recorded(library, output, [source], "strip", request.parameters())
