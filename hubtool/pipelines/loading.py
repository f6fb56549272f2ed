"""load and unload: every check first, then the pipeline's own API or the weights themselves, then a count of what changed."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hubtool.adapters.ir import Adapter
from hubtool.errors import BadValues, LoadMismatch, Unsupported, UsageProblem
from hubtool.pipelines import live
from hubtool.pipelines.activity import Activity, observe, restore_training
from hubtool.pipelines.collapse import Shares, collapsed, load_shares, plan_shares, unload_shares
from hubtool.pipelines.families import family_of
from hubtool.pipelines.kinds import Ask, Content, Effect
from hubtool.pipelines.lora import Plans, check_name, check_unfused, load_layers, unload_layers
from hubtool.pipelines.plan import obstacles, plan
from hubtool.pipelines.report import LoadReport, Record, effect_of, records
from hubtool.pipelines.source import contents
from hubtool.pipelines.targets import Target, find
from hubtool.pipelines.tokens import TokenPlan, load_tokens, plan_tokens, unload_tokens
from hubtool.types import Finding

_NOTHING: Mapping[str, Any] = MappingProxyType({})


def load(
    pipe: Any,
    source: Adapter | str | Path,
    *,
    strength: float = 1.0,
    name: str | None = None,
    trainable: bool = False,
    token: str | Sequence[str] | None = None,
    components: Collection[str] | None = None,
    into: Mapping[str, str] | None = None,
    collapse: bool | None = None,
    settings: Mapping[str, Any] = _NOTHING,
) -> LoadReport:
    """Load what ``kinds`` has a module for into a diffusers pipeline, beside those that are active: adapters of any algorithm, token
    embeddings, Custom Diffusion, hypernetworks, aesthetic gradients, null-text inversions.

    ``source``: a file or an ``Adapter``. ``strength``: the user's factor on every delta. ``name``: by default the file's stem.
    ``trainable``: hand over the factors as fp32 parameters in ``LoadReport.parameters``, the base weights frozen.
    ``token``: what prompts shall call the embeddings. ``components``: only these, for instance ``["unet"]``.
    ``into``: the adapter's component -> the pipeline's, for instance ``{"transformer": "transformer_2"}``.
    ``collapse``: put the change into the weights themselves, keeping the originals for ``unload``. By default only where PEFT has no
    layer for it (LoHa, LoKr, biases, norms ...; the report then says why); False refuses such adapters, True does it always.
    ``settings``: what a kind has beside the strength, such as ``{"steps": 10}`` for an aesthetic embedding.

    Everything is checked before anything changes, and a load that changed other modules than planned is taken back. Raises
    ``Unsupported``, ``ShapeMismatch``, ``BadValues``, ``LoadMismatch``, ``UsageProblem``, and what reading the file raises.
    """
    content = contents(source, Ask(family_of(pipe), components, token, settings))
    goal = _goal(pipe, content, components, into)
    name = _free_name(pipe, source) if name is None else name
    _check(pipe, content, name, strength)
    work = _planned(pipe, content, goal, strength, trainable=trainable, collapse=collapse)
    before = observe(pipe)
    with ExitStack() as undo:
        undo.callback(_take_out, pipe, name, content.effect)
        parameters = _put_in(pipe, work, name, strength, trainable)
        reached = {} if content.effect is None else content.effect.attach(pipe, name, strength)
        tokens = load_tokens(pipe, work.tokens)
        undo.pop_all()
    report = _told(pipe, content, work, LoadReport(name, strength, reached, tokens, parameters))
    records(pipe)[name] = _remembered(report, content, work, goal, before if trainable else None)
    return report


def unload(pipe: Any, name: str) -> None:
    """Remove what was loaded as ``name``: factors, wrappers, changes of weights, hooks, tokens. The base weights have their own bits again.

    ``name`` may also be a token, or an adapter that was loaded by other means. Raises ``UsageProblem`` when there is none, or while
    adapters are fused.
    """
    record = records(pipe).get(name)
    tokens = dict(record.report.tokens) if record and record.report else _tokens_called(pipe, name)
    effect, loaded = effect_of(pipe, name), name in _adapters(pipe)
    if not loaded and not tokens and effect is None:
        present = sorted({*_adapters(pipe), *records(pipe)})
        raise UsageProblem(f"nothing named {name!r} is loaded", hint=f"loaded: {', '.join(present) or 'nothing'}")
    if loaded:
        check_unfused(pipe)
    _take_out(pipe, name, effect)
    unload_tokens(pipe, tokens)
    if record and record.trains:
        restore_training(record.trains)
    records(pipe).pop(name, None)


@dataclass(frozen=True, slots=True)
class _Work:
    """A load that was checked. ``reasons``: why changes go into the weights; either ``shares`` or ``plans`` are empty."""

    targets: list[Target]
    reasons: list[str]
    shares: Shares
    plans: Plans
    tokens: list[TokenPlan]
    findings: list[Finding]


def _planned(
    pipe: Any, content: Content, goal: Mapping[str, str], strength: float, *, trainable: bool, collapse: bool | None
) -> _Work:
    """Everything that can be refused is refused here, before the pipeline changes."""
    adapter = _aimed(content.adapter, goal)
    targets = find(pipe, adapter, adapter.patches)
    reasons = _reasons(pipe, targets, collapse, trainable)
    shares = plan_shares(targets, strength) if reasons else {}
    plans = {} if reasons else plan(targets, trainable=trainable)
    tokens, findings = plan_tokens(pipe, adapter, content.token)
    if content.effect is None:
        _check_asked(targets, strength, trainable)
    else:
        _check_effect(pipe, content, strength, trainable, collapse)
    return _Work(targets, reasons, shares, plans, tokens, findings)


def _told(pipe: Any, content: Content, work: _Work, report: LoadReport) -> LoadReport:
    """The report with what was done to which modules, and what the user should know of it."""
    effect = () if content.effect is None else content.effect.findings(pipe)
    inside = (Finding("collapsed", "info", f"put into the weights: {reason}") for reason in work.reasons)
    return replace(
        report,
        modules={**_modules(work.targets), **report.modules},
        findings=(*work.findings, *content.findings, *effect, *inside),
        collapsed=bool(work.reasons),
        kind=content.kind,
        negatives=_negatives(content, work.tokens),
    )


def _remembered(
    report: LoadReport, content: Content, work: _Work, goal: Mapping[str, str], before: Activity | None
) -> Record:
    dtypes = {(one.component, one.path): one.dtype for layers in work.plans.values() for one in layers}
    back = {theirs: own for own, theirs in goal.items()}
    return Record(report, dtypes, tuple(before.trains) if before else (), back, content.effect)


def _put_in(pipe: Any, work: _Work, name: str, strength: float, trainable: bool) -> tuple[Any, ...]:
    """Either layers or shares of the weights; the parameters to train."""
    load_shares(pipe, work.shares, name)
    parameters = load_layers(pipe, work.plans, name, strength, trainable=trainable) if work.plans else []
    return tuple(parameters) if trainable else ()


def _take_out(pipe: Any, name: str, effect: Effect | None = None) -> None:
    if effect is not None:
        effect.detach(pipe, name)
    unload_shares(pipe, name)
    if name in live.adapter_names(pipe):
        unload_layers(pipe, name)


def _adapters(pipe: Any) -> set[str]:
    """Names of all adapters in the pipeline, as layers or in the weights."""
    return live.adapter_names(pipe) | collapsed(pipe)


def _goal(
    pipe: Any, content: Content, chosen: Collection[str] | None, into: Mapping[str, str] | None
) -> dict[str, str]:
    """The adapter's components that are asked for -> the pipeline's that take them."""
    own, into = tuple(content.adapter.components()), into or {}
    if content.effect is not None:
        own, into = _whole(content, chosen, into), {}
    unknown = {*(chosen or ()), *into} - set(own)
    if unknown:
        raise UsageProblem(f"the adapter has no {', '.join(sorted(unknown))}; it changes {', '.join(own)}")
    goal = {one: into.get(one) or live.alias(pipe, one) for one in own if chosen is None or one in chosen}
    if len(set(goal.values())) < len(goal):
        raise UsageProblem(f"two components of the adapter would go into one: {', '.join(goal)}")
    return goal


def _whole(content: Content, chosen: Collection[str] | None, into: Mapping[str, str]) -> tuple[str, ...]:
    """The components that an effect acts on: all of them, and where they are. Raises ``UsageProblem`` for anything else."""
    assert content.effect is not None
    own = content.effect.components
    if into or (chosen is not None and not {*own} <= {*chosen}):
        raise UsageProblem(f"a file of kind {content.kind} acts on {', '.join(own)} of the pipeline, as a whole")
    return own


def _aimed(adapter: Adapter, goal: Mapping[str, str]) -> Adapter:
    """The patches that are asked for, under the pipeline's names of the components."""
    patches = {(goal[name], path): patch for (name, path), patch in adapter.patches.items() if name in goal}
    return replace(adapter, patches=patches)


def _check(pipe: Any, content: Content, name: str, strength: float) -> None:
    adapter = content.adapter
    if not math.isfinite(strength):
        raise BadValues(f"a strength of {strength} is no number")
    if not adapter.patches and not adapter.embeddings and content.effect is None:
        raise Unsupported("there is nothing in this file that a pipeline can load", hint="hubtool inspect FILE")
    check_name(name)
    if name in records(pipe) or name in _adapters(pipe):
        raise UsageProblem(f"something named {name!r} is loaded already", hint=f"hubtool.unload(pipe, {name!r}) first")
    if adapter.patches:
        check_unfused(pipe)
    family = family_of(pipe)
    if adapter.family and family and adapter.family != family:
        raise LoadMismatch(f"the adapter is for {adapter.family}, this {type(pipe).__name__} is {family}")


def _check_effect(pipe: Any, content: Content, strength: float, trainable: bool, collapse: bool | None) -> None:
    """An effect can be had as it is asked for."""
    assert content.effect is not None
    if trainable or collapse:
        asked = "trained in a pipeline" if trainable else "put into the weights"
        raise Unsupported(f"a file of kind {content.kind} is not {asked}: it acts from outside the weights")
    content.effect.check(pipe, strength)


def _negatives(content: Content, plans: Iterable[TokenPlan]) -> tuple[str, ...]:
    """The negative tokens as the tokenizer spells them."""
    pairs = zip(content.adapter.embeddings, plans, strict=True)
    return tuple(dict.fromkeys(plan.token for own, plan in pairs if own.token in content.negatives))


def _reasons(pipe: Any, targets: list[Target], collapse: bool | None, trainable: bool) -> list[str]:
    """Why this adapter goes into the weights; empty when it becomes layers. Raises ``Unsupported`` where it shall and cannot."""
    reasons = obstacles(pipe, targets)
    if reasons and (trainable or collapse is False):
        hint = "only low-rank layers can be trained" if trainable else "collapse=True puts it into the weights"
        raise Unsupported("; ".join(reasons), hint=hint)
    if collapse and targets:
        if trainable:
            raise UsageProblem("what is put into the weights has no parameters to train: leave out collapse=True")
        return reasons or ["as asked"]
    return reasons


def _check_asked(targets: list[Target], strength: float, trainable: bool) -> None:
    if not targets and trainable:
        raise Unsupported(
            "token embeddings alone are not handed over for training", hint="hubtool train textual_inversion"
        )
    if not targets and strength != 1.0:
        raise UsageProblem("token embeddings have no strength: their vectors are used as they are")


def _modules(targets: Iterable[Target]) -> dict[str, tuple[str, ...]]:
    """Component -> live modules changed."""
    found: dict[str, list[str]] = {}
    for target in targets:
        found.setdefault(target.component, []).extend(target.paths)
    return {component: tuple(dict.fromkeys(paths)) for component, paths in found.items()}


def _free_name(pipe: Any, source: Adapter | str | Path) -> str:
    stem = "adapter" if isinstance(source, Adapter) else Path(source).stem
    plain = re.sub(r"\W+", "_", stem).strip("_") or "adapter"
    plain = plain if plain.isidentifier() else f"adapter_{plain}"
    names = itertools.chain([plain], (f"{plain}_{i}" for i in itertools.count(2)))
    taken = {*_adapters(pipe), *records(pipe)}
    return next(name for name in names if name not in taken)


def _tokens_called(pipe: Any, token: str) -> dict[str, tuple[str, ...]]:
    """``token`` and its further vectors, in every encoder whose tokenizer had it added."""
    found = {}
    for component, (_, tokenizer) in live.encoders(pipe).items():
        added = {one.content for one in tokenizer.added_tokens_decoder.values() if not one.special}
        more = itertools.takewhile(added.__contains__, (f"{token}_{i}" for i in itertools.count(1)))
        if token in added:
            found[component] = (token, *more)
    return found
