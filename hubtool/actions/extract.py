"""extract: the difference of two checkpoints as an adapter; recipe and lineage go with the output."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubtool.actions.where import library_exists
from hubtool.errors import LossyConversion, RegistryError, UsageProblem, WouldOverwrite
from hubtool.formats import TensorFile, open_file
from hubtool.ops.convert import SUFFIXES
from hubtool.ops.execute import execute
from hubtool.ops.extract.request import Request
from hubtool.ops.plan import Plan
from hubtool.tensors.writer import same_file

if TYPE_CHECKING:
    from hubtool.ops.extract.planning import Task
    from hubtool.ops.extract.report import Report
    from hubtool.ops.recipe import Recipe

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
    output: Path
    size: int
    warning: str | None = None

    def to_json(self) -> dict[str, Any]:
        document = {**self.plan.to_json(), **self.report.to_json(), "output": str(self.output), "size": self.size}
        return {**document, "warning": self.warning} if self.warning else document


def prepare(base: str | Path, tuned: str | Path, request: Request) -> Task:
    """What ``extract`` would do, as far as headers tell. Raises what recognising and pairing raise."""
    from hubtool.ops.extract import planning
    from hubtool.ops.extract.pairing import sides

    request.check()
    first, second = sides(open_file(Path(base)), open_file(Path(tuned)), request.family)
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
    _check_output(output, files, options.force)
    with _hashes(files) as hashes, Scratch(output.parent) as scratch:
        plan, report = planning.extract(task, scratch, progress)
        if plan.losses and not options.allow_loss:
            raise _lossy(plan, output)
        plan = _stamped(plan, task, [one.result() for one in hashes])
        size = execute(plan, output, force=options.force, workers=task.request.workers, device=task.request.device)
    return Extracted(plan, report, output, size, _record(output, files, task.request, options.library))


def format_of(output: str | Path) -> str | None:
    """The container that a file name asks for; None where the layout decides."""
    return SUFFIXES.get(Path(output).suffix.lower())


def _check_output(output: Path, inputs: tuple[TensorFile, ...], force: bool) -> None:
    """What can be known before minutes of work."""
    if any(same_file(output, file.path) for file in inputs):
        raise UsageProblem("the output is an input", path=output, hint="choose another name")
    if os.path.lexists(output) and not force:
        raise WouldOverwrite("the output already exists", path=output, hint="choose another name, or add --force")


def _lossy(plan: Plan, output: Path) -> LossyConversion:
    first = plan.losses[0]
    more = f" (and {len(plan.losses) - 1} more)" if len(plan.losses) > 1 else ""
    text = f"layout {plan.layout} has no place for {first.what}: {first.reason}{more}"
    return LossyConversion(text, path=output, hint="choose another --layout, or accept it with --allow-loss")


@contextmanager
def _hashes(files: tuple[TensorFile, ...]) -> Iterator[list[Future[str | None]]]:
    """SHA-256 of the inputs, computed beside the decomposition."""
    pool = ThreadPoolExecutor(1, "hubtool-hash")
    try:
        yield [pool.submit(_sha256, file) for file in files]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _sha256(file: TensorFile) -> str | None:
    if not file.path.is_file():
        return None
    with open(file.path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def recipe_of(task: Task, hashes: list[str | None]) -> Recipe:
    """The recipe that repeats this extraction."""
    from hubtool.ops.recipe import Input, Output, Recipe

    request = task.request
    named = zip((task.base.file, task.tuned.file), ("base", "tuned"), hashes, strict=True)
    return Recipe(
        operation="extract",
        inputs=tuple(Input(path=str(file.path), role=role, sha256=sha256) for file, role, sha256 in named),
        method=request.kind,
        parameters=request.parameters(),
        output=Output(layout=request.layout, format=request.format, dtype=request.dtype),
        seed=request.seed,
    )


def _stamped(plan: Plan, task: Task, hashes: list[str | None]) -> Plan:
    from hubtool.ops.recipe import Parent, stamp

    files = task.base.file, task.tuned.file
    parents = [Parent.of(file, sha256) for file, sha256 in zip(files, hashes, strict=True)]
    return stamp(plan, recipe_of(task, hashes), parents)


def _record(output: Path, files: tuple[TensorFile, ...], request: Request, library: str | None) -> str | None:
    """Record lineage when an input is in the library; the output stands whatever happens here, so a busy library is only told."""
    if not library_exists(library):
        return None
    from hubtool.actions.library import record_conversion

    try:
        record_conversion(library, output, [file.path for file in files], "extract", request.parameters())
    except RegistryError as error:
        return f"lineage was not recorded: {error.message}"
    return None
