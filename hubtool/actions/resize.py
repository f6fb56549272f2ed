"""resize: an adapter at other ranks; recipe and lineage go with the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubtool.actions.outcome import Options, lossy, recorded
from hubtool.actions.recipe import Hashes, RunOptions
from hubtool.actions.refs import locate
from hubtool.errors import UsageProblem
from hubtool.formats import open_file
from hubtool.ops.execute import execute
from hubtool.ops.factor_space.budget import Budget
from hubtool.ops.merge_adapters import Request
from hubtool.ops.plan import Plan
from hubtool.ops.target import SUFFIXES
from hubtool.tensors.device import check_device

if TYPE_CHECKING:
    from hubtool.ops.factor_space.report import Report
    from hubtool.ops.recipe import Recipe

__all__ = ["Options", "Resized", "recipe_of", "request_of", "resize", "run_recipe"]

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Resized:
    """What was done. ``output`` is None for a dry run, whose report has no errors; ``warning``: lineage that failed."""

    plan: Plan
    report: Report
    output: Path | None
    size: int
    warning: str | None = None

    def to_json(self) -> dict[str, Any]:
        document = {**self.plan.to_json(), **self.report.to_json(), "size": self.size}
        document["output"] = None if self.output is None else str(self.output)
        return {**document, "warning": self.warning} if self.warning else document


def resize(
    source: str | Path,
    output: str | Path | None,
    request: Request,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Resized:
    """Write ``source`` (a path or REF) at the ranks that ``request.budget`` allows to ``output``.

    Raises ``UsageProblem`` without a budget, ``ConversionError`` where nothing would become smaller, ``LossyConversion``, ``BadValues``, and
    what opening and writing raise; the output appears whole or not at all.
    """
    from hubtool.ops import resize as ops

    options = options or Options()
    if output is None and not options.dry_run:
        raise UsageProblem("no output is named", hint="give -o OUT or --dry-run")
    check_device(options.device)  # before anything is read
    path = locate(source, options.library)
    hashes = None if options.dry_run else Hashes([path])
    request = _with_format(request, output)
    plan, report = ops.plan(open_file(path), request)
    if plan.losses and not options.allow_loss:
        raise lossy(plan, path)
    if hashes is None or output is None:
        return Resized(plan, report, None, plan.bytes_out)
    import torch  # noqa: F401  it takes a second to load; the hash is taken meanwhile

    stamped = _stamped(plan, path, request, hashes)
    size = execute(
        stamped,
        Path(output),
        force=options.force,
        progress=progress,
        workers=request.workers or options.workers,
        device=options.device,
    )
    return Resized(stamped, report, Path(output), size, _record(path, Path(output), request, options.library))


def _with_format(request: Request, output: str | Path | None) -> Request:
    if request.format is not None or output is None:
        return request
    return replace(request, format=SUFFIXES.get(Path(output).suffix.lower()))


def recipe_of(path: Path, request: Request, plan: Plan) -> Recipe:
    """The recipe that repeats a resize."""
    from hubtool.ops.recipe import Input, Output, Recipe

    parameters = request.budget.to_json()
    parameters |= {} if request.alpha is None else {"alpha": request.alpha}
    parameters |= {} if request.component is None else {"component": request.component}
    given = Input(path=str(path), role="adapter", family=request.family)
    kept = Output(layout=request.layout or plan.layout, format=plan.format, dtype=request.dtype)
    return Recipe("resize", (given,), parameters=parameters, output=kept, seed=request.seed)


def _stamped(plan: Plan, path: Path, request: Request, hashes: Hashes) -> Plan:
    from hubtool.ops.recipe import Parent, stamp

    return stamp(plan, recipe_of(path, request, plan), [Parent.of(open_file(path), hashes.of(path))])


def request_of(recipe: Recipe) -> Request:
    """What a recipe asks for. Raises ``UsageProblem`` for parameters that make no sense."""
    parameters: Mapping[str, Any] = recipe.parameters
    names = ("rank", "energy", "error", "size", "across", "max_rank")
    return Request(
        budget=Budget(**{name: parameters[name] for name in names if name in parameters}),
        alpha=parameters.get("alpha"),
        component=parameters.get("component"),
        layout=recipe.output.layout,
        format=recipe.output.format,
        dtype=recipe.output.dtype,
        family=recipe.inputs[0].family,
        seed=recipe.seed or 0,
    )


def run_recipe(
    recipe: Recipe, inputs: Sequence[Path], output: Path | None, options: RunOptions, progress: Progress | None = None
) -> Resized:
    """Carry out a resize that a recipe asks for."""
    if len(inputs) != 1:
        raise UsageProblem(f"resize takes one adapter, not {len(inputs)}")
    own = Options(force=options.force, dry_run=options.dry_run, library=options.library, device=options.device)
    return resize(inputs[0], output, replace(request_of(recipe), workers=options.workers), own, progress)


def _record(path: Path, output: Path, request: Request, library: str | None) -> str | None:
    return recorded(library, output, [path], "resize", request.budget.to_json())
