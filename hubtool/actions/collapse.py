"""collapse: adapters of any kinds into a checkpoint, or out of it again; lineage goes into the library when an input is in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubtool.actions.late_hashes import LateHashes, large
from hubtool.actions.outcome import recorded
from hubtool.actions.recipe import RunOptions, fingerprint, resolve
from hubtool.actions.refs import locate
from hubtool.actions.where import library_exists
from hubtool.errors import NotFound, UsageProblem
from hubtool.formats import open_file
from hubtool.formats.base import TensorFile
from hubtool.ops import collapse as ops
from hubtool.ops import recipe as recipes
from hubtool.ops.execute import execute
from hubtool.ops.plan import Plan
from hubtool.ops.recipe import Input, Output, Parent, Recipe
from hubtool.ops.strengths import Strengths, parse
from hubtool.ops.target import SUFFIXES
from hubtool.tensors.device import check_device
from hubtool.tensors.writer import same_file

if TYPE_CHECKING:
    from hubtool.ops.collapse.checking import Compared, Verdict

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Options:
    """How a collapse is carried out.

    ``family`` where base or adapter cannot tell; ``container``: ``safetensors`` or ``torch-zip``, by default the output's suffix, else the
    base's own; ``check``: how many changed tensors are computed again in fp64; ``undo``: take the changes out; ``compare``: a checkpoint
    whose values the result is compared with; ``search``: folders with adapters that a stamped recipe knows by name and hash; ``hashes``:
    the SHA-256 of inputs above 1 GiB goes into the recipe, too; ``verified``: hashes that inputs state have been compared already.
    """

    family: str | None = None
    container: str | None = None
    allow_mismatch: bool = False
    check: int = 0
    undo: bool = False
    compare: Path | None = None
    search: tuple[Path, ...] = ()
    hashes: bool = False
    verified: bool = False
    force: bool = False
    dry_run: bool = False
    library: str | None = None
    device: str = "cpu"
    workers: int | None = None


@dataclass(frozen=True, slots=True)
class Collapsed:
    """What was done. ``restored``: whether an undo gave the very bytes that the recipe remembers (None where it remembers none)."""

    plan: Plan
    report: ops.Report
    output: Path | None
    size: int
    recipe: Recipe
    verdict: Verdict | None = None
    compared: Compared | None = None
    restored: bool | None = None
    warning: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the checks that were asked for found nothing wrong."""
        return self.verdict is None or self.verdict.passed

    def to_json(self) -> dict[str, Any]:
        document = {**self.plan.to_json(), **self.report.to_json(), "recipe": self.recipe.to_json()}
        document |= {"output": None if self.output is None else str(self.output), "size": self.size}
        document |= {"restored": self.restored} if self.restored is not None else {}
        document |= {"check": self.verdict.to_json()} if self.verdict is not None else {}
        document |= {"compare": self.compared.to_json()} if self.compared is not None else {}
        return document | ({"warning": self.warning} if self.warning else {})


def collapse(
    base: str | Path | Input,
    adapters: Sequence[Input],
    output: str | Path | None,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Collapsed:
    """Collapse ``adapters`` (path or REF, strengths) into ``base`` and write ``output``; with ``undo``, the way back.

    An undo without adapters takes those of the recipe that the result keeps. Raises ``UsageProblem``, ``ConversionError`` for an adapter
    that matches nothing, ``ShapeMismatch``, ``BadValues``, ``Unsupported``, and what opening and writing raise; the output appears whole
    or not at all.
    """
    options = options or Options()
    if output is None and not options.dry_run:
        raise UsageProblem("no output is named", hint="give -o OUT or --dry-run")
    check_device(options.device)  # before anything is read
    first = base if isinstance(base, Input) else Input(path=str(base))
    file = open_file(locate(first.path or first.ref or "", options.library))
    paths, adapters = _adapters(file, adapters, options)
    return _run(_Job(first, file, paths, tuple(adapters), None if output is None else Path(output), options), progress)


def _adapters(file: TensorFile, adapters: Sequence[Input], options: Options) -> tuple[list[Path], Sequence[Input]]:
    if adapters:
        return [locate(one.path or one.ref or "", options.library) for one in adapters], adapters
    if not options.undo:
        raise UsageProblem("no adapter is named")
    kept = kept_recipe(file)
    if kept is None or kept.operation != "collapse":
        raise NotFound(
            "the checkpoint keeps no recipe of a collapse", path=file.path, hint="name the adapters and their strengths"
        )
    known = kept.by_role("adapter")
    if not known:
        raise NotFound(
            "the recipe of this checkpoint names no adapter",
            path=file.path,
            hint="name the adapters and their strengths",
        )
    where = RunOptions(library=options.library, folder=file.path.resolve().parent, search=options.search)
    return [resolve(one, where) for one in known], known


def kept_recipe(file: TensorFile) -> Recipe | None:
    """The recipe that a hubtool output keeps: in its metadata, or as a document of its folder."""
    if file.path.is_dir():
        return recipes.read(file.path) if (file.path / recipes.DOCUMENT).is_file() else None
    return recipes.of_metadata(file.metadata)


@dataclass(frozen=True, slots=True)
class _Job:
    base: Input
    file: TensorFile
    paths: Sequence[Path]
    adapters: tuple[Input, ...]
    output: Path | None
    options: Options

    @property
    def container(self) -> str | None:
        """What the options or the suffix of the output ask for; a folder's output is a folder unless it has one."""
        if self.options.container is not None or self.output is None:
            return self.options.container
        return SUFFIXES.get(self.output.suffix.lower())

    def recipe(self, made: Plan) -> Recipe:
        options = self.options
        base = replace(self.base, path=str(self.file.path), ref=None, role="base", family=options.family)
        adapters = (
            replace(one, path=str(path), ref=None, role="adapter")
            for one, path in zip(self.adapters, self.paths, strict=True)
        )
        parameters = {"undo": True} if options.undo else {}
        parameters |= {"allow_mismatch": True} if options.allow_mismatch else {}
        return Recipe("collapse", (base, *adapters), parameters=parameters, output=Output(format=made.format))


def _run(job: _Job, progress: Progress | None) -> Collapsed:
    inputs = [job.file.path, *job.paths]
    if job.output is not None and any(same_file(job.output, path) for path in inputs):
        raise UsageProblem("the output is an input", path=job.output, hint="choose another name")
    options = job.options
    late = None if options.dry_run else _late(job, inputs)  # starts hashing
    base = ops.Base(job.file, options.family)
    files = [open_file(path) for path in job.paths]
    parts = [
        ops.read(file, base, strengths_of(one), options.family) for file, one in zip(files, job.adapters, strict=True)
    ]
    made, report = ops.plan(
        base, parts, container=job.container, undo=options.undo, allow_mismatch=options.allow_mismatch
    )
    recipe = job.recipe(made)
    if late is None or job.output is None:
        return Collapsed(made, report, None, made.bytes_out, recipe)
    parents = [Parent.of(file, late.mark(path)) for file, path in zip([job.file, *files], inputs, strict=True)]
    stamped = made.header is None  # else the output is the base again, to the byte
    made = recipes.stamp(made, recipe, parents) if stamped else made
    size = execute(
        made, job.output, force=options.force, progress=progress, device=options.device, workers=options.workers,
        late=late.complete if stamped else None,
    )  # fmt: skip
    done = Collapsed(made, report, job.output, size, recipe)
    warning = _record(job, lambda: late.complete(recipes.dump(recipes.anonymous(recipe, parents)).encode()))
    return _checked(replace(done, warning=warning), base, job)


def _late(job: _Job, inputs: Sequence[Path]) -> LateHashes:
    """Fingerprints of the inputs, but for large ones that nobody asked for. It never depends on the machine: equal recipes, equal bytes."""
    stated = [one.sha256 if job.options.verified else None for one in (job.base, *job.adapters)]
    wanted = [path for path in inputs if job.options.hashes or not large(path)]
    return LateHashes(wanted, dict(zip(inputs, stated, strict=True)))


def strengths_of(one: Input) -> Strengths:
    """The strengths that an input of a recipe states."""
    return parse(one.strengths, one.blocks, one.strength)


def _checked(done: Collapsed, base: ops.Base, job: _Job) -> Collapsed:
    """What was asked to be checked afterwards, on what lies on disk."""
    assert job.output is not None
    options, result = job.options, open_file(job.output)
    if options.check and not options.undo:
        from hubtool.ops.collapse.checking import check

        done = replace(done, verdict=check(base, done.report, result, options.check))
    if options.compare is not None:
        from hubtool.ops.collapse.checking import compare

        done = replace(done, compared=compare(result, open_file(options.compare)))
    kept = kept_recipe(job.file) if options.undo else None
    before = next((one.sha256 for one in kept.by_role("base")), None) if kept else None
    return replace(done, restored=None if before is None else fingerprint(job.output) == before)


def _record(job: _Job, recipe: Callable[[], bytes]) -> str | None:
    if job.output is None or not library_exists(job.options.library):
        return None
    inputs = [job.file.path, *job.paths]
    return recorded(job.options.library, job.output, inputs, "collapse", {"recipe": json.loads(recipe())})


def run_recipe(
    recipe: Recipe, inputs: Sequence[Path], output: Path | None, options: RunOptions, progress: Progress | None = None
) -> Collapsed:
    """Carry out a collapse that a recipe asks for; its first input of role ``base`` (or its first input) is the base."""
    roles = [one.role for one in recipe.inputs]
    at = roles.index("base") if "base" in roles else 0
    rest = [index for index in range(len(inputs)) if index != at]
    named = [replace(one, path=str(path), ref=None) for one, path in zip(recipe.inputs, inputs, strict=True)]
    own = Options(
        family=recipe.inputs[at].family,
        container=recipe.output.format if recipe.output.format in ("safetensors", "torch-zip") else None,
        allow_mismatch=bool(recipe.parameters.get("allow_mismatch")),
        undo=bool(recipe.parameters.get("undo")),
        verified=True,
        force=options.force,
        dry_run=options.dry_run,
        library=options.library,
        device=options.device,
        workers=options.workers,
    )
    return collapse(named[at], [named[index] for index in rest], output, own, progress)
