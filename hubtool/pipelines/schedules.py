"""Strengths that change while a picture is made: by denoising step, by component, block and path, for several adapters at once.

    with scheduled(pipe, {"style.safetensors": linear(1.0, 0.2), "detail": phases({0.0: 0.0, 0.6: 0.9})}, steps=30):
        pipe(prompt, num_inference_steps=30)

A schedule is a number, a list with a number for every step, a function of (step, steps), or a ``Schedule``, which also says what parts of
the adapter count how much. The weights come back bit for bit at the end of the ``with``, however it is left.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any
from weakref import WeakSet

from hubtool.adapters.ir import Adapter
from hubtool.errors import BadValues, LoadMismatch, Unsupported, UsageProblem
from hubtool.pipelines import live, weights
from hubtool.pipelines.collapse import collapsed, plan_shares
from hubtool.pipelines.composition import Composition, Layer, Slot, compose
from hubtool.pipelines.families import family_of
from hubtool.pipelines.lora import check_unfused
from hubtool.pipelines.report import effect_of
from hubtool.pipelines.schedule_steps import following
from hubtool.pipelines.schedule_store import TensorStore
from hubtool.pipelines.schedule_weights import Component, State, weigh
from hubtool.pipelines.source import read
from hubtool.pipelines.targets import find
from hubtool.pipelines.weights import Share

Curve = Callable[[int, int], float]  # (step from 0, number of steps) -> strength
CurveLike = float | Sequence[float] | Curve
Parts = Mapping[str, CurveLike] | Callable[[str, str], float]
Source = Adapter | str | Path
CACHE_BYTES = 4 << 30

_BUSY: WeakSet[Any] = WeakSet()  # the components that follow a schedule now


@dataclass(frozen=True, slots=True)
class Schedule:
    """``curve``: the strength by step. ``parts``: factors on it, which may be curves too: a mapping of component names, globs or starts of
    paths (``unet``, ``unet:down_blocks``, ``*.attn2.*``), where the last that fits counts and 1 where none does; or a function of
    (component, path), such as the ``of`` of block strengths.
    """

    curve: CurveLike = 1.0
    parts: Parts = field(default_factory=lambda: MappingProxyType({}))


ScheduleLike = CurveLike | Schedule
Asked = Mapping[Any, ScheduleLike] | Iterable[tuple[Source, ScheduleLike]]


def linear(start: float, end: float) -> Curve:
    """From ``start`` at the first step to ``end`` at the last, evenly."""
    return lambda step, steps: start + (end - start) * _progress(step, steps)


def cosine(start: float, end: float) -> Curve:
    """From ``start`` to ``end`` along half a cosine: slow, fast, slow."""

    def curve(step: int, steps: int) -> float:
        share = (1 - math.cos(math.pi * _progress(step, steps))) / 2
        return start + (end - start) * share

    return curve


def phases(strengths: Mapping[float, float]) -> Curve:
    """``{0.0: 1.0, 0.5: 0.2}``: 1 in the first half of the steps, 0.2 in the second; 0 before the first share named.

    Raises ``UsageProblem`` for shares outside [0, 1).
    """
    if not strengths or not all(0 <= share < 1 for share in strengths):
        raise UsageProblem("phases begin at shares of the steps, from 0 up to but not including 1")

    def curve(step: int, steps: int) -> float:
        begun = [share for share in strengths if step >= round(share * steps)]
        return strengths[max(begun)] if begun else 0.0

    return curve


@contextmanager
def scheduled(pipe: Any, schedules: Asked, *, steps: int, cache_bytes: int = CACHE_BYTES) -> Iterator[Composition]:
    """Adapters in ``pipe`` with strengths by schedule while the context is open; any number of runs of ``steps`` steps each.

    ``schedules``: what to load or what is loaded -> its schedule; pairs where the source is an ``Adapter``. A name that is loaded keeps
    its place, and its schedule stands for the strength it was loaded with; a file or an ``Adapter`` is there for the context only. Text
    encoders run before the first step and keep its strengths. Do not load, unload or change the scheduler inside.
    ``cache_bytes``: bound of the cache, which lies where the weights lie. Composed weights that do not fit in it, all together, are
    composed again when their step comes. ``steps``: those that really run: image-to-image leaves out the first.

    Yields the composition: ``at(step)`` sets the strengths by hand where a loop works without ``pipe.scheduler``. Everything is checked
    before anything changes. Raises ``UsageProblem``, ``BadValues``, ``LoadMismatch``, ``ShapeMismatch``, ``Unsupported``.
    """
    if steps < 1:
        raise UsageProblem(f"{steps} steps")
    check_unfused(pipe)
    pairs = list(schedules.items()) if isinstance(schedules, Mapping) else list(schedules)
    _check_once(pairs)
    store = TensorStore(cache_bytes)
    models = live.modules(pipe)
    if any(model in _BUSY for model in models.values()):
        raise UsageProblem("this pipeline follows a schedule already", hint="give all adapters to one `scheduled`")
    composition = compose(_slots(pipe, pairs, steps, store), steps, store)
    with ExitStack() as undo:
        for model in models.values():
            undo.callback(_BUSY.discard, model)
            _BUSY.add(model)
        undo.callback(composition.restore)
        composition.at(0)
        if getattr(pipe, "scheduler", None) is not None:
            undo.enter_context(following(pipe.scheduler, composition.at))
        yield composition


def _check_once(pairs: Iterable[tuple[Source, ScheduleLike]]) -> None:
    names = Counter(str(source) for source, _ in pairs if not isinstance(source, Adapter))
    twice = [name for name, times in names.items() if times > 1]
    if twice:
        raise UsageProblem(f"{', '.join(twice)} has two schedules")


def _slots(pipe: Any, pairs: Iterable[tuple[Source, ScheduleLike]], steps: int, store: TensorStore) -> Iterator[Slot]:
    """Layers for adapters that are there as layers; parameters for all others."""
    shares: dict[str, list[tuple[Share, float, State]]] = {}
    for source, asked in pairs:
        series = _Series(asked if isinstance(asked, Schedule) else Schedule(asked), steps)
        if isinstance(source, str) and source in live.adapter_names(pipe):
            yield from _layers(pipe, source, series)
        elif isinstance(source, str) and (effect := effect_of(pipe, source)) is not None:
            yield from effect.slots(pipe, source, series.of)
        else:
            for share, inside in _shares(pipe, source):
                strengths = series.of(*share.source)
                if share.patch.algorithm == "set":  # a replaced weight is what it is, or not there
                    strengths = tuple(float(value != 0) for value in strengths)
                shares.setdefault(share.source[0], []).append((share, inside, strengths))
        series.check(source)
    for name, rows in shares.items():
        yield from weigh(Component(name, live.modules(pipe)[name], store), rows, steps)


def _layers(pipe: Any, name: str, series: _Series) -> Iterator[Layer]:
    for component, model in live.components(pipe).items():
        for path, layer in live.adapter_layers(model, name).items():
            if name not in layer.active_adapters:
                raise UsageProblem(f"{name!r} is loaded but not active", hint=f"pipe.set_adapters([{name!r}]) first")
            strengths = series.of(component, live.canonical_path(component, path))
            yield Layer(layer, name, tuple((value,) for value in strengths), layer.scaling[name])


def _shares(pipe: Any, source: Source) -> Iterator[tuple[Share, float]]:
    """Each share, and its strength inside the weights at this moment."""
    if isinstance(source, str) and source in collapsed(pipe):
        for model in live.modules(pipe).values():
            yield from ((share, share.strength) for share in weights.ledger(model).shares.get(source, ()))
        return
    adapter = _fitting(pipe, source)
    planned = plan_shares(find(pipe, adapter, adapter.patches), 1.0)
    yield from ((share, 0.0) for own in planned.values() for share in own)


def _fitting(pipe: Any, source: Source) -> Adapter:
    family = family_of(pipe)
    adapter = read(source, family)
    if adapter.family and family and adapter.family != family:
        raise LoadMismatch(f"the adapter is for {adapter.family}, this {type(pipe).__name__} is {family}")
    if adapter.embeddings or not adapter.patches:
        hint = "hubtool.load it first, with a name, and give the schedule to the name"
        raise Unsupported("token embeddings have no strength to follow a schedule", hint=hint)
    patches = {(live.alias(pipe, component), path): patch for (component, path), patch in adapter.patches.items()}
    return replace(adapter, patches=patches)


class _Series:
    """A schedule as numbers: every curve is asked once for every step, before anything changes."""

    def __init__(self, schedule: Schedule, steps: int) -> None:
        self._main = _numbers(schedule.curve, steps)
        self._parts = schedule.parts if callable(schedule.parts) else None
        patterns = {} if callable(schedule.parts) else schedule.parts
        self._patterns = {pattern: _numbers(curve, steps) for pattern, curve in patterns.items()}
        self._unused = set(self._patterns)

    def of(self, component: str, path: str) -> State:
        """The strengths of one module by step. What is not a denoiser runs before the first step: its strengths stay."""
        if self._parts is not None:
            factors = _numbers(float(self._parts(component, path)), len(self._main))
        else:
            fitting = [pattern for pattern in self._patterns if _fits(pattern, component, path)]
            self._unused -= set(fitting)
            factors = self._patterns[fitting[-1]] if fitting else (1.0,) * len(self._main)
        strengths = tuple(one * factor for one, factor in zip(self._main, factors, strict=True))
        return (strengths[0],) * len(strengths) if "encoder" in component else strengths

    def check(self, source: Source) -> None:
        """Raise ``UsageProblem`` for patterns that no module answers to: most likely misspelt."""
        if self._unused:
            called = "the adapter" if isinstance(source, Adapter) else str(source)
            raise UsageProblem(f"no module of {called} answers to {', '.join(sorted(self._unused))}")


def _numbers(curve: CurveLike, steps: int) -> State:
    if callable(curve):
        values = [float(curve(step, steps)) for step in range(steps)]
    elif isinstance(curve, Sequence):
        if len(curve) != steps:
            raise UsageProblem(f"a list of {len(curve)} strengths for {steps} steps")
        values = [float(value) for value in curve]
    else:
        values = [float(curve)] * steps
    wrong = next((value for value in values if not math.isfinite(value)), None)
    if wrong is not None:
        raise BadValues(f"a strength of {wrong} is no number")
    return tuple(values)


def _progress(step: int, steps: int) -> float:
    return step / (steps - 1) if steps > 1 else 0.0


def _fits(pattern: str, component: str, path: str) -> bool:
    """A component's name, a glob, or the start of a path that ends before a dot; ``component:`` before it names where."""
    owner, colon, inside = pattern.rpartition(":")
    if colon and owner not in ("*", component):
        return False
    return (not colon and pattern == component) or fnmatchcase(path, inside) or f"{path}.".startswith(f"{inside}.")
