"""export: a base with adapters collapsed, as a pipeline of its own: a diffusers folder with tokenizers, or a single file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hubtool.actions.bases import located
from hubtool.actions.generate_inputs import Refs, pairs
from hubtool.actions.late_hashes import large
from hubtool.actions.outcome import lossy, recorded
from hubtool.actions.recipe import Hashes, RunOptions
from hubtool.actions.refs import locate
from hubtool.adapters.ir import Adapter, Embedding
from hubtool.errors import FileError, Unsupported, UsageProblem, WouldOverwrite
from hubtool.formats import TensorFile, open_file
from hubtool.formats.documents import read_json
from hubtool.layouts.identify import identify
from hubtool.ops import collapse as ops
from hubtool.ops import exporting
from hubtool.ops import recipe as recipes
from hubtool.ops.collapse.match import Account, match
from hubtool.ops.collapse.shares import changed
from hubtool.ops.execute import execute
from hubtool.ops.execute_folder import SHARD, execute_folder
from hubtool.ops.exporting import Wanted
from hubtool.ops.folder_plan import FolderPlan
from hubtool.ops.plan import Plan
from hubtool.ops.recipe import Input, Output, Parent, Recipe
from hubtool.ops.strengths import parse
from hubtool.ops.target import DTYPES
from hubtool.tensors.expr import Expr, Literal
from hubtool.tensors.writer import same_file

Progress = Callable[[int], None]
_SINGLE = (".safetensors",)
_INDEX = "model_index.json"


@dataclass(frozen=True, slots=True)
class Options:
    """``dtype``: fp32, fp16, bf16, by default the base's own; ``shard``: bytes of the largest weights file.

    ``config_from``: a diffusers folder that gives configurations and tokenizers to the pipeline of a single file; ``hashes``: the SHA-256
    of a base above 1 GiB goes into the recipe, too; ``download``: a repository may be fetched.
    """

    dtype: str | None = None
    shard: int | None = None
    config_from: Path | None = None
    family: str | None = None
    allow_mismatch: bool = False
    allow_loss: bool = False
    hashes: bool = False
    force: bool = False
    dry_run: bool = False
    download: bool = True
    library: str | None = None
    device: str = "cpu"
    workers: int | None = None


@dataclass(frozen=True, slots=True)
class Exported:
    """What was done. ``tokens``: encoder -> the names it has learnt; ``output`` is None for a dry run; ``warning``: lineage that failed."""

    plan: Plan
    accounts: tuple[Account, ...]
    tokens: Mapping[str, tuple[str, ...]]
    recipe: Recipe
    output: Path | None
    size: int
    notes: tuple[str, ...] = ()
    warning: str | None = None

    def to_json(self) -> dict[str, Any]:
        document = {**self.plan.to_json(), "adapters": [one.to_json() for one in self.accounts]}
        document |= {"tokens": {name: list(own) for name, own in self.tokens.items()}, "recipe": self.recipe.to_json()}
        document |= {"output": None if self.output is None else str(self.output), "size": self.size}
        document["notes"] = [*self.plan.notes, *self.notes]
        return document | ({"warning": self.warning} if self.warning else {})


@dataclass(slots=True)
class _Job:
    """What has been found so far. ``changes``: stored key -> what it becomes; ``folder``: where new tokenizers are written."""

    base: ops.Base
    inputs: tuple[Input, ...]
    files: tuple[TensorFile, ...]
    options: Options
    folder: Path
    parts: list[ops.Part] = field(default_factory=list)
    words: list[tuple[str, tuple[Embedding, ...]]] = field(default_factory=list)
    changes: dict[str, Expr] = field(default_factory=dict)
    tokens: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def paths(self) -> list[Path]:
        return [self.base.file.path, *(file.path for file in self.files)]


def export(
    base: str | Path,
    adapters: Refs | Sequence[Input],
    output: str | Path,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write ``base`` with ``adapters`` collapsed as a pipeline: to a diffusers folder, or to a single file (``.safetensors``).

    ``base``: a folder, a single file, a reference of the library, or a repository. ``adapters``: paths or references, each alone or as
    (reference, strength), or a mapping of them to strengths. Token embeddings are added to tokenizers and text encoders. Changes are
    summed in fp32 and rounded once.
    Raises what recognising raises for kinds that change no weights, ``ConversionError`` for an adapter that matches nothing or a folder
    that diffusers could not open, ``UsageProblem`` for tokens that are taken, ``Unsupported`` for tokens in a single file,
    ``WouldOverwrite``; the output appears whole or not at all.
    """
    options, output = options or Options(), Path(output)
    path = located(base, options.library, download=options.download)
    _check_dtype(options.dtype)
    inputs = tuple(
        one if isinstance(one, Input) else Input(path=str(one[0]), strength=one[1]) for one in _each(adapters)
    )
    files = tuple(open_file(locate(one.path or one.ref or "", options.library)) for one in inputs)
    with tempfile.TemporaryDirectory(prefix="hubtool-words-") as folder:
        job = _Job(ops.Base(open_file(path), options.family), inputs, files, options, Path(folder))
        if not options.dry_run:
            _check_output(job, output)
        return _run(job, output, progress)


def _each(adapters: Refs | Sequence[Input]) -> Sequence[Any]:
    given = list(adapters) if not isinstance(adapters, Mapping | str) else []
    return given if given and isinstance(given[0], Input) else pairs(adapters)  # type: ignore[arg-type]


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in ("fp32", "fp16", "bf16"):
        raise UsageProblem(f"no such dtype: {dtype}", hint="one of fp32, fp16, bf16")


def _check_output(job: _Job, output: Path) -> None:
    """What can be known before anything is read. Only a pipeline folder is ever replaced."""
    if any(same_file(output, path) or output.resolve() in path.resolve().parents for path in job.paths):
        raise UsageProblem("the output is an input, or holds one", path=output, hint="choose another name")
    if os.path.lexists(output) and not job.options.force:
        raise WouldOverwrite("the output already exists", path=output, hint="choose another name, or add --force")
    if output.is_dir() and not (output / _INDEX).is_file():
        raise WouldOverwrite("this folder is no pipeline: it is not replaced", path=output, hint="choose another name")


def _run(job: _Job, output: Path, progress: Progress | None) -> Exported:
    accounts = _weights(job)
    single = output.suffix.lower() in _SINGLE
    wanted = _with_words(job, _wanted(job, single))
    made = exporting.plan(job.base, job.changes, wanted)
    if made.losses and not job.options.allow_loss:
        raise lossy(made, job.base.file.path)
    recipe = _recipe(job, made)
    if job.options.dry_run:
        return Exported(made, tuple(accounts), job.tokens, recipe, None, made.bytes_out, tuple(job.notes))
    hashed = [path for path in job.paths if job.options.hashes or not large(path)]
    hashes = Hashes(hashed)
    marks = [hashes.of(path) if path in hashed else None for path in job.paths]
    parents = [Parent.of(file, mark) for file, mark in zip((job.base.file, *job.files), marks, strict=True)]
    made = recipes.stamp(made, recipe, parents)
    size = _write(made, output, job.options, progress)
    warning = recorded(job.options.library, output, job.paths, "pipeline_export", _parameters(job.options))
    return Exported(made, tuple(accounts), job.tokens, recipe, output, size, tuple(job.notes), warning)


def _weights(job: _Job) -> list[Account]:
    """Read every adapter; what changes weights becomes changes of the base's tensors."""
    for one, file in zip(job.inputs, job.files, strict=True):
        found = identify(file)
        if found.kind == "textual_inversion":
            _no_strength(one, file)
            job.words.append((file.path.stem, found.embeddings))
            continue
        strengths = parse(one.strengths, one.blocks, one.strength)
        part = ops.read(file, job.base, strengths, job.options.family)
        own = part.adapter.embeddings
        job.words += [(part.name, own)] if own else []
        # the first note says that tokens stay outside, which they do not here
        job.notes += [f"{part.name}: {note}" for note in part.notes[bool(own) :]]
        job.parts.append(part)
    shares, accounts = match(job.base, job.parts, allow_mismatch=job.options.allow_mismatch)
    job.changes = {key: changed(job.base.tensors[key], own) for key, own in shares.items()}
    return accounts


def _no_strength(one: Input, file: TensorFile) -> None:
    if one.strength not in (None, 1.0):
        raise UsageProblem("token embeddings have no strength", path=file.path, hint="name the file alone")


def _wanted(job: _Job, single: bool) -> Wanted:
    dtype = DTYPES[job.options.dtype] if job.options.dtype else None
    whole = job.options.shard is not None and not single
    return Wanted(single, dtype, whole, job.options.config_from)


def _with_words(job: _Job, wanted: Wanted) -> Wanted:
    """The new tokens in tables, tokenizers and configurations. Raises ``Unsupported`` where there is no place for tokenizers."""
    if not job.words:
        return wanted
    if wanted.single:
        named = ", ".join(name for name, _ in job.words)
        raise Unsupported(f"a single file has no tokenizer for the tokens of {named}", hint="-o FOLDER")
    from hubtool.pipelines.vocabulary import Vocabulary

    tables = _tables(job.base)
    sizes = {name: _size(job.base, keys[0]) for name, keys in tables.items()}
    root = job.base.file.path if job.base.file.path.is_dir() else job.options.config_from
    if root is None:
        text = "new tokens need the tokenizers of the pipeline, and a single file has none"
        raise UsageProblem(text, hint="--config-from FOLDER: a diffusers folder of the same family")
    vocabulary = Vocabulary(root, sizes, _classes(root))
    for name, own in job.words:
        plans, findings = vocabulary.learn(Adapter(job.base.family, {}, own))
        job.notes += [f"{name}: {finding.message}" for finding in findings]
        for one in plans:
            job.tokens[one.encoder] = (*job.tokens.get(one.encoder, ()), *one.names())
    for encoder, learnt in vocabulary.learnt.items():
        vectors = [_literal(one) for one in learnt]
        for key in tables[encoder]:
            job.changes[key] = exporting.appended(job.base, job.changes, key, vectors)
    edits = {name: _edit(vocabulary, name) for name in vocabulary.learnt}
    return replace(wanted, edits=edits, copies=vocabulary.save(job.folder))


def _edit(vocabulary: Any, encoder: str) -> exporting.Edit:
    return lambda document: dict(vocabulary.config(encoder, document))


def _tables(base: ops.Base) -> dict[str, list[str]]:
    """Encoder -> stored keys of its token table (T5 has one under two names)."""
    from hubtool.ops.distill.tables import is_table
    from hubtool.ops.sides import side

    found: dict[str, list[str]] = {}
    own = side(base.file, base.family)
    for key, tensor in own.parameters() if own is not None else ():
        spot = base.find(key[0], key[1].removesuffix(".weight")) if is_table(key, tensor.shape) else None
        if spot is not None:
            found.setdefault(key[0], []).append(spot.key)
    return found


def _size(base: ops.Base, key: str) -> tuple[int, int, str]:
    ref = base.tensors[key]
    return ref.shape[0], ref.shape[1], ref.dtype


def _classes(root: Path) -> dict[str, str | None]:
    """Tokenizer -> the class that the pipeline's index names."""
    index = read_json(root / _INDEX) if (root / _INDEX).is_file() else {}
    homes = index.items() if isinstance(index, dict) else ()
    return {name: str(home[1]) for name, home in homes if isinstance(home, list) and len(home) == 2 and home[1]}


def _literal(vectors: Any) -> Expr:
    """A tensor's bytes as an expression."""
    import torch

    from hubtool.tensors.dtypes import FROM_TORCH

    flat = vectors.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    data = bytes(flat.tolist())
    return Literal(data, FROM_TORCH[str(vectors.dtype).removeprefix("torch.")], tuple(vectors.shape))


def _parameters(options: Options) -> dict[str, Any]:
    asked: dict[str, Any] = {"allow_mismatch": True} if options.allow_mismatch else {}
    return asked | ({"shard": options.shard} if options.shard is not None else {})


def _recipe(job: _Job, made: Plan) -> Recipe:
    base = Input(path=str(job.base.file.path), role="base", family=job.options.family)
    own = (
        replace(one, path=str(file.path), ref=None, role="adapter")
        for one, file in zip(job.inputs, job.files, strict=True)
    )
    kept = Output(format=made.format, dtype=job.options.dtype)
    return Recipe("pipeline_export", (base, *own), parameters=_parameters(job.options), output=kept)


def _write(made: Plan, output: Path, options: Options, progress: Progress | None) -> int:
    how: dict[str, Any] = {"progress": progress, "workers": options.workers, "device": options.device}
    if not isinstance(made, FolderPlan):
        return execute(made, output, force=options.force, **how)
    with _replacing(output) as target:
        return execute_folder(made, target, shard=options.shard or SHARD, **how)


@contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """Where to write a folder. One that lies at ``output`` already gives way when the new one is whole, and comes back if that fails."""
    if not os.path.lexists(output):
        yield output
        return
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as aside:
        made, old = Path(aside) / "new", Path(aside) / "old"
        yield made
        os.rename(output, old)
        try:
            os.rename(made, output)
        except OSError as error:
            os.rename(old, output)
            raise FileError(f"cannot replace the folder: {error.strerror}", path=output) from error


def run_recipe(
    recipe: Recipe, inputs: Sequence[Path], output: Path | None, options: RunOptions, progress: Progress | None = None
) -> Exported:
    """Carry out an export that a recipe asks for. Raises ``UsageProblem`` without a base."""
    roles = [one.role for one in recipe.inputs]
    if roles.count("base") != 1:
        raise UsageProblem("an export has one input of the role base")
    at = roles.index("base")
    named = [replace(one, path=str(path), ref=None) for one, path in zip(recipe.inputs, inputs, strict=True)]
    own = Options(
        dtype=recipe.output.dtype, family=recipe.inputs[at].family, shard=recipe.parameters.get("shard"),
        allow_mismatch=bool(recipe.parameters.get("allow_mismatch")), allow_loss=True, force=options.force,
        dry_run=options.dry_run or output is None, library=options.library, device=options.device, workers=options.workers,
    )  # fmt: skip
    suffix = ".safetensors" if recipe.output.format == "safetensors" else ""
    adapters = [named[i] for i in range(len(named)) if i != at]
    return export(inputs[at], adapters, output or Path(f"export{suffix}"), own, progress)
