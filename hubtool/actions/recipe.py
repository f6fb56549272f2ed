"""recipe: run one, show one, check that one still gives the same bytes. Every operation in weight space can be asked for by a recipe."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from hubtool.actions.refs import locate
from hubtool.errors import ConversionError, FileMissing, HubtoolError, NotFound, UsageProblem
from hubtool.formats import open_file
from hubtool.ops import recipe as recipes
from hubtool.ops.recipe import Input, Recipe
from hubtool.tensors.reading import Sources, pread_into

Progress = Callable[[int], None]
_DEEPEST = 8
_STEP = 64 << 20
_SEARCH = "name the folder it lies in: hubtool recipe run SOURCE --search FOLDER"
STEPS = ".hubtool-steps-"  # how a folder of intermediate results begins
_FOLDER_FORMATS = ("diffusers-folder", "peft-folder")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a recipe is carried out. ``folder``: the recipe's own, where its relative paths start; ``search``: further folders that may
    hold inputs known by name and hash; ``library``: as everywhere."""

    force: bool = False
    dry_run: bool = False
    library: str | None = None
    folder: Path | None = None
    search: tuple[Path, ...] = ()
    device: str = "cpu"
    workers: int | None = None


@dataclass(frozen=True, slots=True)
class Ran:
    """What a run did. ``result``: the operation's own answer; ``sha256``: the output's fingerprint, None for a dry run."""

    recipe: Recipe
    output: Path | None
    sha256: str | None
    result: Any

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.to_json(),
            "output": None if self.output is None else str(self.output),
            "sha256": self.sha256,
            "result": self.result.to_json(),
        }


@dataclass(frozen=True, slots=True)
class Verdict:
    """``expected``: what the recipe or the file says; ``found``: what running it gave."""

    source: Path
    expected: str
    found: str

    @property
    def same(self) -> bool:
        return self.expected == self.found

    def to_json(self) -> dict[str, Any]:
        return {"source": str(self.source), "expected": self.expected, "found": self.found, "same": self.same}


class Hashes:
    """Fingerprints of inputs, taken by a thread of its own from the start: what else happens meanwhile hides their time."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._found: dict[Path, Future[str]] = {path: Future() for path in paths}
        # a daemon: after an error nobody waits for the rest
        threading.Thread(target=self._take, name="hubtool-hash", daemon=True).start()

    def _take(self) -> None:
        for path, future in self._found.items():
            try:
                future.set_result(fingerprint(path))
            except (HubtoolError, OSError) as error:
                future.set_exception(error)

    def of(self, path: Path) -> str:
        """Wait for the fingerprint of one of the paths. Raises what reading it raised."""
        return self._found[path].result()


def fingerprint(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of ``sha256  name`` lines of its weights files, by name."""
    if not path.is_dir():
        return _sha256(path)
    names = {file.relative_to(path).as_posix(): file for file in open_file(path).files if file.suffix != ".json"}
    lines = (f"{_sha256(file)}  {name}\n" for name, file in sorted(names.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    """In large steps: between two of them a busy main thread may keep the interpreter for milliseconds."""
    digest = hashlib.sha256()
    with Sources() as sources:
        fd = sources.fd(path)
        size = os.fstat(fd).st_size
        buffer = memoryview(bytearray(min(size, _STEP)))
        for at in range(0, size, _STEP):
            view = buffer[: min(_STEP, size - at)]
            pread_into(fd, view, at, path)
            digest.update(view)
    return digest.hexdigest()


def resolve(one: Input, options: RunOptions) -> Path:
    """The file that an input means, checked against its hash where it has one. Raises ``NotFound``, ``ConversionError`` for other bytes."""
    if one.path is not None:
        return _verified(one, (options.folder or Path()) / one.path)
    if one.ref is not None:
        return _verified(one, locate(one.ref, options.library))
    # a name alone is believed in the recipe's own folder; in the current one the bytes have to agree
    for folder in (options.folder, *options.search, Path() if one.sha256 else None):
        path = None if folder is None or one.name is None else folder / Path(one.name).name
        if path is not None and path.exists() and one.sha256 in (None, fingerprint(path)):
            return path
    if one.sha256 is None:
        raise NotFound(f"the input {one} is not here", hint=_SEARCH)
    try:
        return _verified(one, locate(one.sha256, options.library))
    except (FileMissing, NotFound):
        text = f"the input {one} (sha256 {one.sha256[:12]}) is neither here nor in the library"
        raise NotFound(text, hint=f"{_SEARCH}, or scan it into the library") from None


def _verified(one: Input, path: Path) -> Path:
    if not path.exists():
        raise FileMissing("the recipe names a file that is not there", path=path)
    if one.sha256 is not None and fingerprint(path) != one.sha256:
        raise ConversionError(f"the recipe means other bytes (sha256 {one.sha256[:12]}) than this file has", path=path)
    return path


def run(
    recipe: Recipe, output: Path | None, options: RunOptions | None = None, progress: Progress | None = None
) -> Ran:
    """Carry out a recipe and what is nested in it; intermediate results live beside the output while it runs.

    Raises ``UsageProblem`` for an operation that no recipe can ask for, ``NotFound`` for inputs, and what the operations raise.
    """
    options = options or RunOptions()
    if output is None and not options.dry_run:
        raise UsageProblem("no output is named", hint="give -o OUT")
    if sum(1 for _ in recipe.steps()) > 1 and _depth(recipe) > _DEEPEST:
        raise UsageProblem(f"recipes inside recipes, {_depth(recipe)} deep; {_DEEPEST} are the limit")
    beside = output.parent if output is not None else None
    with tempfile.TemporaryDirectory(dir=beside, prefix=STEPS) as name:
        inputs = [_made(one, at, Path(name), options) for at, one in enumerate(recipe.inputs)]
        action = _action(recipe.operation)
        result = action(recipe, inputs, output, options, progress)
    sha256 = None if output is None or options.dry_run else fingerprint(output)
    return Ran(recipe, output, sha256, result)


def _depth(recipe: Recipe) -> int:
    return 1 + max((_depth(one.recipe) for one in recipe.inputs if one.recipe is not None), default=0)


def _action(operation: str) -> Callable[..., Any]:
    name = f"hubtool.actions.{operation}"
    found: Callable[..., Any] | None = None
    try:
        found = getattr(import_module(name), "run_recipe", None)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
    if found is None:
        raise UsageProblem(f"no recipe can ask for {operation!r}")
    return found


def _made(one: Input, at: int, folder: Path, options: RunOptions) -> Path:
    """The path of an input; a nested recipe is run first, into a file of its own."""
    if one.recipe is None:
        return resolve(one, options)
    suffix = "" if one.recipe.output.format in _FOLDER_FORMATS else ".safetensors"
    path = folder / str(at + 1) / f"{_step(one.recipe)}{suffix}"
    path.parent.mkdir()
    run(one.recipe, path, replace(options, dry_run=False, force=False))
    return path


def _step(recipe: Recipe) -> str:
    """A name for an intermediate result, which the output will call its parent: ``resize-of-style``."""
    names = [one.name or Path(one.path or one.ref or "").stem for one in recipe.inputs if one.recipe is None]
    stem = re.sub(r"[^\w.-]+", "_", Path(names[0]).stem)[:80] if names else ""
    return f"{recipe.operation}-of-{stem}" if stem else recipe.operation


def read(source: str | os.PathLike[str], library: str | None = None) -> tuple[Recipe, Path]:
    """(the recipe in a file, or the one that a hubtool output keeps; where it was found)."""
    path = locate(source, library)
    return recipes.read(path), path


def check(source: Path, options: RunOptions | None = None, progress: Progress | None = None) -> Verdict:
    """Run the recipe that ``source`` keeps (or is), and compare the result's SHA-256 with that of ``source`` (or what it says).

    The result is written beside ``source`` and removed. Raises ``UsageProblem`` for a recipe that does not say what its result was.
    """
    options = options or RunOptions()
    recipe, path = read(source, options.library)
    plain = path.is_file() and path.suffix.lower() in (".json", ".yaml", ".yml")
    expected = recipe.output.sha256 if plain else fingerprint(path)
    if expected is None:
        raise UsageProblem(
            "the recipe does not say what its result was",
            hint='add "output": {"sha256": ...}, or check the output itself',
        )
    here = options.folder or path.resolve().parent
    beside = here if os.access(here, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=beside, prefix=".hubtool-check-") as name:
        output = Path(name) / (path.name if not plain else _name(recipe))
        found = run(recipe, output, replace(options, folder=here, dry_run=False), progress)
    return Verdict(path, expected, found.sha256 or "")


def _name(recipe: Recipe) -> str:
    kind = recipe.output.format
    return "result" if kind in _FOLDER_FORMATS else "result.pt" if kind == "torch-zip" else "result.safetensors"
