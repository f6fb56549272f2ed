"""generate: a base and any adapters become pictures that remember how they were made. ``pipeline`` stops before the pictures."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hubtool.actions.generate_inputs import Chosen, Ready, Refs, ready, with_schedules
from hubtool.actions.generate_settings import Settings
from hubtool.actions.load import load, unload
from hubtool.errors import UsageProblem, WouldOverwrite
from hubtool.pipelines import generating, grids, opening, pictures
from hubtool.pipelines.curves import curve
from hubtool.pipelines.generating import Request, Watch
from hubtool.pipelines.pictures import Part, Recipe
from hubtool.pipelines.report import LoadReport

_PACKAGES = ("torch", "diffusers", "transformers", "peft")
Strengths = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """``grid``: ``adapters``, or strengths to compare; ``negatives``: embeddings that belong into the negative prompt.

    ``schedules``: file name of an adapter -> how its strength changes from step to step, in the words of ``pipelines.curves``.
    ``settings``: reference or file name of an adapter -> what its kind has to be set, such as ``{"steps": 10}``.
    ``config_from``: a diffusers folder that a single file takes configurations and tokenizers from. ``hashes``: fingerprint the base
    even above 1 GiB.
    """

    negatives: Sequence[str | Path] = ()
    grid: str | Strengths | None = None
    schedules: Mapping[str, str] = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)
    device: str = "auto"
    dtype: str = "auto"
    config_from: Path | None = None
    hashes: bool = False
    force: bool = False
    dry_run: bool = False
    library: str | None = None


@dataclass(frozen=True, slots=True)
class Generated:
    """``outputs``: path of every picture, with its recipe; ``loads``: what loading each adapter did. Without pictures for a dry run."""

    recipe: Recipe
    outputs: tuple[tuple[Path, Recipe], ...]
    loads: tuple[LoadReport, ...] = ()
    seconds: float = 0.0
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.to_json(),
            "outputs": [{"path": str(path), "seeds": list(one.request.seeds)} for path, one in self.outputs],
            "loads": [one.to_json() for one in self.loads],
            "seconds": round(self.seconds, 3),
            "dry_run": self.dry_run,
        }


def pipeline(
    base: str | Path, adapters: Refs = (), *, device: str = "auto", dtype: str = "auto",
    config_from: str | Path | None = None, settings: Settings | None = None, library: str | None = None,
) -> Any:  # fmt: skip
    """A diffusers pipeline of ``base`` with ``adapters`` loaded, on the best device.

    ``base``: a diffusers folder, a single file, a reference to the library, or a repository of the Hub. ``adapters``: paths or
    references, each alone or as (reference, strength); or a mapping of them to strengths. Adapters that PEFT has no layer for go into
    the weights; ``hubtool.unload(pipe, name)`` takes any of them out again. ``settings``: as of ``Options``. The family and the settings
    are checked before weights are read. Raises ``LoadMismatch``, ``Unsupported``, ``MissingExtra``, ``HubError`` and what ``hubtool.load``
    raises.
    """
    opening.need_packages()
    found = ready(base, adapters, settings=settings, library=library)
    pipe = _opened(found, device, dtype, Path(config_from) if config_from else None)
    for one in found.all:
        load(pipe, one.path, strength=one.part.strength, settings=one.settings)
    return pipe


def generate(
    base: Any, adapters: Refs, request: Request, output: str | Path, options: Options | None = None,
    watch: Watch = lambda: None,
) -> Generated:  # fmt: skip
    """Make one picture for every seed of ``request`` (or one grid), with the recipe inside each.

    ``base``: as for ``pipeline``, or a pipeline that is open already: it gets its own bits back at the end, also after an error.
    ``output``: a PNG, or a folder (existing, or named with a trailing slash). Several pictures of one name get their seed into it.
    Raises what ``pipeline`` raises, ``WouldOverwrite`` before anything is computed, ``UsageProblem`` for what the pipeline cannot do.
    """
    options, start = options or Options(), time.monotonic()
    request.check()
    paths = _paths(output, request, options)
    if not options.dry_run:
        opening.need_packages()
    found = ready(
        base, adapters, options.negatives, settings=options.settings, library=options.library, hashes=options.hashes
    )
    found = with_schedules(found, options.schedules)
    if options.grid is not None and options.schedules:
        raise UsageProblem("a grid compares constant strengths: leave the schedules out")
    _cells(found, request, options.grid)
    recipe = Recipe(found.base, found.parts, request, grid=_grid_json(options.grid), versions=_versions())
    if options.dry_run:
        return Generated(recipe, tuple((path, recipe) for path in paths), dry_run=True)
    pipe = _opened(found, options.device, options.dtype, options.config_from)
    generating.check_whole(pipe)
    recipe = _settled(recipe, pipe)
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
    make = _grid if options.grid is not None else _singles
    outputs, loads = make(pipe, found, recipe, paths, options, watch)
    return Generated(recipe, tuple(outputs), tuple(loads), time.monotonic() - start)


def _opened(found: Ready, device: str, dtype: str, config_from: Path | None) -> Any:
    """A pipeline that is open already stays where it is."""
    if found.pipe is not None:
        return found.pipe
    where, precision = opening.place(device, dtype)
    return opening.opened(found.source, precision, device=where, config_from=config_from)


def _settled(recipe: Recipe, pipe: Any) -> Recipe:
    """The recipe with what the pipeline decides."""
    request = generating.settled(pipe, recipe.request)
    sampler = generating.scheduler_class(pipe, request)
    return replace(
        recipe, request=request, sampler=sampler, device=str(pipe.device), dtype=str(pipe.dtype).removeprefix("torch.")
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    from hubtool import __version__

    found = {"hubtool": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _paths(output: str | Path, request: Request, options: Options) -> list[Path]:
    """Where the pictures go. Raises ``WouldOverwrite``, ``UsageProblem`` for another suffix."""
    path = Path(output)
    folder = path.is_dir() or os.fspath(output).endswith(("/", os.sep))
    if not folder and path.suffix.lower() != ".png":
        raise UsageProblem("pictures are written as PNG, which keeps their recipe", hint=f"-o {path.stem}.png")
    if options.grid is not None:
        paths = [path / "grid.png" if folder else path]
    elif folder:
        paths = [path / f"{seed}.png" for seed in request.seeds]
    else:
        several = len(request.seeds) > 1
        paths = [path.with_stem(f"{path.stem}-{seed}") if several else path for seed in request.seeds]
    if len(set(paths)) < len(paths):
        raise UsageProblem("a seed is named twice: both would give the same picture")
    taken = [one for one in paths if one.exists() and not options.force]
    if taken and not options.dry_run:
        raise WouldOverwrite("the output exists", path=taken[0], hint="--force overwrites it")
    return paths


@contextmanager
def loaded(pipe: Any, chosen: Iterable[tuple[Chosen, float]], library: str | None = None) -> Iterator[list[LoadReport]]:
    """``pipe`` with these adapters while the block runs; a strength of 0 is not loaded at all."""
    with ExitStack() as undo:
        reports = []
        for one, strength in chosen:
            if strength != 0:
                reports.append(load(pipe, one.path, strength=strength, library=library, settings=one.settings))
                undo.callback(unload, pipe, reports[-1].name)
        yield reports


def _singles(
    pipe: Any, found: Ready, recipe: Recipe, paths: list[Path], options: Options, watch: Watch
) -> tuple[list[tuple[Path, Recipe]], list[LoadReport]]:
    with loaded(pipe, [(one, one.part.strength) for one in found.all]) as reports:
        request = _with_tokens(recipe.request, found, reports)
        outputs = []

        def around() -> AbstractContextManager[Any]:
            return _following(pipe, found, reports, recipe.request.steps)

        for path, (seed, image) in zip(paths, generating.pictures(pipe, request, watch, around), strict=True):
            own = replace(recipe, request=_of_picture(recipe.request, seed, image))
            pictures.save(image, path, own, force=options.force)
            outputs.append((path, own))
    return outputs, reports


def _following(
    pipe: Any, found: Ready, reports: Sequence[LoadReport], steps: int | None
) -> AbstractContextManager[Any]:
    """The strengths of scheduled adapters change from step to step; a schedule is a factor on the adapter's own strength."""
    from hubtool.pipelines.schedules import scheduled

    loads = zip([one.part for one in found.all if one.part.strength != 0], reports, strict=True)
    asked = {load.name: curve(part.schedule, part.strength) for part, load in loads if part.schedule}
    if asked and steps is None:
        raise UsageProblem("a schedule needs a number of steps", hint="--steps 30")
    return scheduled(pipe, asked, steps=steps) if asked and steps else nullcontext()


def _of_picture(request: Request, seed: int, image: Any) -> Request:
    return replace(request, seeds=(seed,), width=image.width, height=image.height)


def _with_tokens(request: Request, found: Ready, reports: Sequence[LoadReport]) -> Request:
    """The tokens of negative embeddings at the end of the negative prompt."""
    count = len(found.negatives)
    told = reports[-count:] if count else ()
    tokens = [next(iter(report.tokens.values()))[0] for report in told if report.tokens]
    return replace(request, negative=", ".join([*filter(None, [request.negative]), *tokens])) if tokens else request


def _grid(
    pipe: Any, found: Ready, recipe: Recipe, paths: list[Path], options: Options, watch: Watch
) -> tuple[list[tuple[Path, Recipe]], list[LoadReport]]:
    """One load for every distinct vector of strengths, however many seeds and cells need it."""
    rows, columns = _cells(found, recipe.request, options.grid)
    made: dict[Strengths, dict[int, Any]] = {}
    for vector in dict.fromkeys(vector for _, _, vectors in rows for vector in vectors):
        fixed = [(one, 1.0) for one in (*found.fixed, *found.negatives)]
        with loaded(pipe, [*zip(found.variable, vector, strict=True), *fixed]) as reports:
            made[vector] = dict(generating.pictures(pipe, _with_tokens(recipe.request, found, reports), watch))
    cells = [[made[vector][seed] for vector in vectors] for _, seed, vectors in rows]
    sheet = grids.joined(cells, [label for label, _, _ in rows], columns)
    size = {"width": cells[0][0].width, "height": cells[0][0].height}
    own = replace(recipe, request=replace(recipe.request, **size))
    pictures.save(sheet, paths[0], own, force=options.force)
    return [(paths[0], own)], reports


def _cells(
    found: Ready, request: Request, grid: str | Strengths | None
) -> tuple[list[tuple[str, int, list[Strengths]]], list[str]]:
    """((label, seed, strengths of every cell) of every row, labels of the columns). Raises ``UsageProblem`` for nothing to compare."""
    if grid is None:
        return [], []
    parts = [one.part for one in found.variable]
    if not parts:
        raise UsageProblem("there is no adapter with a strength to compare")
    alone = [tuple(float(i == j) for i in range(len(parts))) for j in range(len(parts))]
    each = [(Path(part.name).stem, mask) for part, mask in zip(parts, alone, strict=True)]
    each += [("all", (1.0,) * len(parts))] if len(parts) > 1 else []
    if isinstance(grid, str):
        labels = [*map(_label, parts), *(name for name, _ in each[len(parts) :])]
        scaled = [_scaled(mask, parts) for _, mask in each]
        own = [("none", (0.0,) * len(parts)), *zip(labels, scaled, strict=True)]
        return [(f"seed {seed}", seed, [one for _, one in own]) for seed in request.seeds], [name for name, _ in own]
    several = len(request.seeds) > 1
    rows = [
        (f"{name}, seed {seed}" if several else name, seed, [tuple(one * value for one in mask) for value in grid])
        for seed in request.seeds
        for name, mask in each
    ]
    return rows, [f"{value:g}" for value in grid]


def _label(part: Part) -> str:
    name = Path(part.name).stem
    return name if part.strength == 1 else f"{name} {part.strength:g}"


def _scaled(mask: Strengths, parts: Sequence[Part]) -> Strengths:
    return tuple(one * part.strength for one, part in zip(mask, parts, strict=True))


def _grid_json(grid: str | Strengths | None) -> Mapping[str, Any] | None:
    if grid is None:
        return None
    return {"of": grid} if isinstance(grid, str) else {"of": "strengths", "strengths": list(grid)}
