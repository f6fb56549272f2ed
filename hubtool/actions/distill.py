"""distill: what a fine-tuned pipeline has learnt beyond its base, as a LoRA with its new tokens; recipe and lineage go with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubtool.actions import extract as extraction
from hubtool.actions.bases import located
from hubtool.actions.distill_tokens import Tokens
from hubtool.actions.outcome import check_output, lossy, recorded
from hubtool.actions.recipe import Hashes, RunOptions
from hubtool.adapters.ir import Embedding
from hubtool.errors import UsageProblem
from hubtool.formats import open_file
from hubtool.layouts.emission import Loss
from hubtool.ops.execute import execute
from hubtool.ops.extract.request import Request
from hubtool.ops.plan import Plan
from hubtool.ops.recipe import Parent, Recipe, stamp

if TYPE_CHECKING:
    from hubtool.ops.distill.tables import Table
    from hubtool.ops.extract.planning import Task
    from hubtool.ops.extract.report import Report

Progress = Callable[[int], None]
TOKENS = ("auto", "beside")
_ALONE = "no weight differs: what was learnt are the tokens alone"


@dataclass(frozen=True, slots=True)
class Options:
    """``tokens``: ``auto`` puts new tokens into the output where its layout has a place for them or nothing else is new, else (and with
    ``beside``) into files beside it. ``names``: of the new tokens, where no tokenizer tells. ``download``: repositories may be fetched.
    """

    allow_loss: bool = False
    force: bool = False
    tokens: str = "auto"
    names: tuple[str, ...] = ()
    download: bool = True
    library: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that headers and tokenizers tell: the extraction, and the token tables of both pipelines."""

    task: Task
    tables: tuple[Table, ...]
    embeddings: tuple[Embedding, ...]
    options: Options

    @property
    def total(self) -> int:
        """What progress counts up to."""
        return self.task.total

    @property
    def apart(self) -> bool:
        """Whether tokens shall have files of their own."""
        return self.options.tokens != "auto"

    @property
    def family(self) -> str:
        return self.task.pairs.family

    @property
    def layout(self) -> str:
        return self.task.request.layout

    def to_json(self) -> dict[str, Any]:
        return {**self.task.to_json(), "tokens": [one.to_json() for one in self.embeddings]}


@dataclass(frozen=True, slots=True)
class Distilled:
    """What was done. ``losses``: what of the change the output cannot hold; ``others``: files of tokens beside it."""

    plan: Plan
    report: Report
    recipe: Recipe
    output: Path
    size: int
    embeddings: tuple[Embedding, ...] = ()
    losses: tuple[Loss, ...] = ()
    notes: tuple[str, ...] = ()
    others: tuple[Path, ...] = ()
    warning: str | None = None

    def to_json(self) -> dict[str, Any]:
        document = {**self.plan.to_json(), **self.report.to_json(), "recipe": self.recipe.to_json()}
        document["components"] = {name: one.to_json() for name, one in components(self.report).items()}
        document["tokens"] = [one.to_json() for one in self.embeddings]
        document["losses"] = [loss.to_json() for loss in self.losses]
        document["notes"] = [*self.plan.notes, *self.notes]
        document |= {"output": str(self.output), "others": [str(path) for path in self.others], "size": self.size}
        return {**document, "warning": self.warning} if self.warning else document


@dataclass(frozen=True, slots=True)
class Share:
    """One component. ``error``: ||dW - out|| / ||dW|| over its decomposed modules; None where there is none."""

    changed: int
    unchanged: int
    modules: int = 0
    ranks: tuple[int, ...] = field(default=())
    error: float | None = None

    def to_json(self) -> dict[str, Any]:
        known = {"changed": self.changed, "unchanged": self.unchanged, "modules": self.modules}
        return {**known, "ranks": list(self.ranks), "error": self.error}


def components(report: Report) -> dict[str, Share]:
    """The report by component."""
    found = {}
    for name, counts in report.components.items():
        own = [one for one in report.modules if one.name.startswith(f"{name}.")]
        energy = sum(one.change**2 for one in own)
        error = math.sqrt(sum((one.error * one.change) ** 2 for one in own) / energy) if energy else None
        ranks = tuple(sorted({one.rank for one in own}))
        found[name] = Share(counts.changed, counts.unchanged, len(own), ranks, error)
    return found


def distill(
    tuned: str | Path,
    base: str | Path,
    output: str | Path,
    request: Request,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Distilled:
    """Write what ``tuned`` has learnt beyond ``base`` to ``output``: ``prepare`` and ``run`` in one."""
    asked = request if request.format else replace(request, format=extraction.format_of(output))
    return run(prepare(tuned, base, asked, options), output, progress)


def prepare(tuned: str | Path, base: str | Path, request: Request, options: Options | None = None) -> Job:
    """What distilling would do, as far as headers and tokenizers tell.

    Each side is a diffusers folder, a single file, a reference of the library, or a repository (``actions.bases``). Raises what finding,
    recognising and pairing raise, ``UsageProblem`` for names that do not fit the new tokens.
    """
    from hubtool.ops.distill import tables
    from hubtool.ops.extract import planning
    from hubtool.ops.sides import sides

    options = options or Options()
    request.check()
    if options.tokens not in TOKENS:
        raise UsageProblem(f"no such place for tokens: {options.tokens}", hint=f"one of {', '.join(TOKENS)}")
    paths = [located(one, options.library, download=options.download) for one in (base, tuned)]
    first, second = sides([open_file(path) for path in paths], request.family)
    found = tuple(tables.tables(first, second, options.names))
    task = planning.prepare(tables.trimmed(first, found), tables.trimmed(second, found), request)
    return Job(task, found, tables.embeddings(found), options)


def run(job: Job, output: str | Path, progress: Progress | None = None) -> Distilled:
    """Carry out what ``prepare`` returned. ``progress`` counts up to ``job.total``. Where only tokens are new, they are the output.

    Raises ``LossyConversion`` before anything is decomposed, where the tuned pipeline changed what no adapter holds, unless that is
    allowed; ``WouldOverwrite``, and what decomposing and writing raise. Every file appears whole or not at all.
    """
    from hubtool.ops.distill import losses
    from hubtool.ops.extract import planning
    from hubtool.ops.extract.scratch import Scratch

    output, task, options = Path(output), job.task, job.options
    tokens, notes = Tokens.of(job, output), tuple(_notes(job))
    _check_output(job, (output, *tokens.files))
    left = losses.losses(task, job.tables)
    if left and not options.allow_loss:
        raise _refused(left, task)
    hashes = Hashes([task.base.file.path, task.tuned.file.path])
    with Scratch(output.parent) as scratch, ExitStack() as undo:
        plan, report = planning.extract(task, scratch, progress, empty=bool(job.embeddings))
        if not plan.tensors:
            tokens, notes = Tokens.alone(job, output), (*notes, _ALONE)
        if plan.losses and not options.allow_loss:
            raise lossy(plan, output)
        recipe = recipe_of(job)
        parents = [Parent.of(side.file, hashes.of(side.file.path)) for side in (task.base, task.tuned)]
        plan = stamp(tokens.within(plan), recipe, parents)
        for path in tokens.write(plan.metadata, force=options.force):
            undo.callback(path.unlink, missing_ok=True)  # tokens without their LoRA are of no use
        size = 0
        if plan.tensors:
            size = execute(plan, output, force=options.force, workers=task.request.workers, device=task.request.device)
        undo.pop_all()
    output, *others = (*([output] if plan.tensors else []), *tokens.files)
    return Distilled(
        plan, report, recipe, output, size or output.stat().st_size, job.embeddings, (*left, *plan.losses), notes, tuple(others),
        _record(job, (output, *others)),
    )  # fmt: skip


def _refused(left: Sequence[Loss], task: Task) -> Exception:
    from hubtool.errors import LossyConversion

    more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
    hint = "--dense keeps norms and biases, --as full every difference; --allow-loss leaves them out"
    return LossyConversion(f"{left[0].what}: {left[0].reason}{more}", path=task.tuned.file.path, hint=hint)


def _check_output(job: Job, outputs: Sequence[Path]) -> None:
    inputs = [side.file.path for side in (job.task.base, job.task.tuned)]
    for path in outputs:
        check_output(path, inputs, replace=job.options.force and not path.is_dir())


def _notes(job: Job) -> Iterable[str]:
    from hubtool.ops.distill.losses import absent

    for table in job.tables:
        if table.added and not table.named:
            names = ", ".join(table.added.values())
            yield f"{table.component}: no tokenizer tells the new tokens, they are called {names} (--token names them)"
        if table.tuned.shape[0] < table.base.shape[0]:
            yield f"{table.component}: the tuned table is {table.base.shape[0] - table.tuned.shape[0]} tokens shorter than the base's"
    yield from (f"{name} is not compared: the base has none" for name in absent(job.task))


def recipe_of(job: Job) -> Recipe:
    """The recipe that repeats this distillation."""
    asked: dict[str, Any] = {"tokens": job.options.tokens} if job.options.tokens != "auto" else {}
    asked |= {"names": list(job.options.names)} if job.options.names else {}
    made = extraction.recipe_of(job.task)
    return replace(made, operation="distill", parameters={**made.parameters, **asked})


def run_recipe(
    recipe: Recipe, inputs: list[Path], output: Path | None, options: RunOptions, progress: Progress | None = None
) -> Distilled | Job:
    """Carry out a recipe whose operation is ``distill``; the job alone for a dry run. Raises ``UsageProblem`` without base and tuned."""
    roles = dict(zip((one.role for one in recipe.inputs), inputs, strict=True))
    if roles.keys() != {"base", "tuned"}:
        raise UsageProblem("distilling has two inputs, of the roles base and tuned")
    parameters = dict(recipe.parameters)
    tokens, names = str(parameters.pop("tokens", "auto")), tuple(parameters.pop("names", ()))
    wanted = Request.of(
        parameters, kind=recipe.method, layout=recipe.output.layout, dtype=recipe.output.dtype, format=recipe.output.format,
        family=next((one.family for one in recipe.inputs if one.family), None), seed=recipe.seed, device=options.device,
        workers=options.workers,
    )  # fmt: skip
    own = Options(allow_loss=True, force=options.force, tokens=tokens, names=names, library=options.library)
    job = prepare(roles["tuned"], roles["base"], wanted, own)
    return job if options.dry_run or output is None else run(job, output, progress)


def _record(job: Job, outputs: Sequence[Path]) -> str | None:
    inputs = [job.task.base.file.path, job.task.tuned.file.path]
    warnings = [
        recorded(job.options.library, path, inputs, "distill", job.task.request.parameters()) for path in outputs
    ]
    return next(filter(None, warnings), None)
