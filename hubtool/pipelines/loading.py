"""load and unload: every check first, then the pipeline's own API or the weights themselves, then a count of what changed."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from hubtool.adapters.ir import Adapter
from hubtool.errors import BadValues, LoadMismatch, Unsupported, UsageProblem
from hubtool.pipelines import live
from hubtool.pipelines.activity import observe, restore_training
from hubtool.pipelines.collapse import Shares, collapsed, load_shares, plan_shares, unload_shares
from hubtool.pipelines.families import family_of
from hubtool.pipelines.lora import Plans, check_name, check_unfused, load_layers, unload_layers
from hubtool.pipelines.plan import obstacles, plan
from hubtool.pipelines.report import LoadReport, Record, records
from hubtool.pipelines.source import read
from hubtool.pipelines.targets import Target, find
from hubtool.pipelines.tokens import load_tokens, plan_tokens, unload_tokens
from hubtool.types import Finding


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
) -> LoadReport:
    """Load an adapter (of any kind, token embeddings, or both) into a diffusers pipeline, beside those that are active.

    ``source``: a file or an ``Adapter``. ``strength``: the user's factor on every delta. ``name``: by default the file's stem.
    ``trainable``: hand over the factors as fp32 parameters in ``LoadReport.parameters``, the base weights frozen.
    ``token``: what prompts shall call the embeddings. ``components``: only these, for instance ``["unet"]``.
    ``into``: the adapter's component -> the pipeline's, for instance ``{"transformer": "transformer_2"}``.
    ``collapse``: put the change into the weights themselves, keeping the originals for ``unload``. By default only where PEFT has no
    layer for it (LoHa, LoKr, biases, norms ...; the report then says why); False refuses such adapters, True does it always.

    Everything is checked before anything changes, and a load that changed other modules than planned is taken back. Raises
    ``Unsupported``, ``ShapeMismatch``, ``BadValues``, ``LoadMismatch``, ``UsageProblem``, and what reading the file raises.
    """
    adapter = read(source, family_of(pipe))
    goal = _goal(pipe, adapter, components, into)
    adapter = replace(
        adapter, patches={(goal[c], path): patch for (c, path), patch in adapter.patches.items() if c in goal}
    )
    name = _free_name(pipe, source) if name is None else name
    _check(pipe, adapter, name, strength)
    targets = find(pipe, adapter, adapter.patches)
    reasons = _reasons(pipe, targets, collapse, trainable)
    shares = plan_shares(targets, strength) if reasons else {}
    plans = {} if reasons else plan(targets, trainable=trainable)
    token_plans, findings = plan_tokens(pipe, adapter, token)
    _check_asked(targets, strength, trainable)
    before = observe(pipe)
    with ExitStack() as undo:
        undo.callback(_take_out, pipe, name)
        parameters = _put_in(pipe, plans, shares, name, strength, trainable)
        tokens = load_tokens(pipe, token_plans)
        undo.pop_all()
    said = (*findings, *(Finding("collapsed", "info", f"put into the weights: {reason}") for reason in reasons))
    report = LoadReport(name, strength, _modules(targets), tokens, parameters, said, bool(reasons))
    dtypes = {(one.component, one.path): one.dtype for layers in plans.values() for one in layers}
    back = {theirs: own for own, theirs in goal.items()}
    records(pipe)[name] = Record(report, dtypes, tuple(before.trains) if trainable else (), back)
    return report


def unload(pipe: Any, name: str) -> None:
    """Remove what was loaded as ``name``: factors, wrappers, changes of weights, tokens. The base weights have the bits they had before.

    ``name`` may also be a token, or an adapter that was loaded by other means. Raises ``UsageProblem`` when there is none, or while
    adapters are fused.
    """
    record = records(pipe).get(name)
    tokens = dict(record.report.tokens) if record and record.report else _tokens_called(pipe, name)
    loaded = name in _adapters(pipe)
    if not loaded and not tokens:
        present = sorted({*_adapters(pipe), *records(pipe)})
        raise UsageProblem(f"nothing named {name!r} is loaded", hint=f"loaded: {', '.join(present) or 'nothing'}")
    if loaded:
        check_unfused(pipe)
        _take_out(pipe, name)
    unload_tokens(pipe, tokens)
    if record and record.trains:
        restore_training(record.trains)
    records(pipe).pop(name, None)


def _put_in(pipe: Any, plans: Plans, shares: Shares, name: str, strength: float, trainable: bool) -> tuple[Any, ...]:
    """Either layers or shares of the weights; the parameters to train."""
    load_shares(pipe, shares, name)
    parameters = load_layers(pipe, plans, name, strength, trainable=trainable) if plans else []
    return tuple(parameters) if trainable else ()


def _take_out(pipe: Any, name: str) -> None:
    unload_shares(pipe, name)
    if name in live.adapter_names(pipe):
        unload_layers(pipe, name)


def _adapters(pipe: Any) -> set[str]:
    """Names of all adapters in the pipeline, as layers or in the weights."""
    return live.adapter_names(pipe) | collapsed(pipe)


def _goal(
    pipe: Any, adapter: Adapter, chosen: Collection[str] | None, into: Mapping[str, str] | None
) -> dict[str, str]:
    """The adapter's components that are asked for -> the pipeline's that take them."""
    own, into = adapter.components(), into or {}
    unknown = {*(chosen or ()), *into} - set(own)
    if unknown:
        raise UsageProblem(f"the adapter has no {', '.join(sorted(unknown))}; it changes {', '.join(own)}")
    goal = {one: into.get(one) or live.alias(pipe, one) for one in own if chosen is None or one in chosen}
    if len(set(goal.values())) < len(goal):
        raise UsageProblem(f"two components of the adapter would go into one: {', '.join(goal)}")
    return goal


def _check(pipe: Any, adapter: Adapter, name: str, strength: float) -> None:
    if not math.isfinite(strength):
        raise BadValues(f"a strength of {strength} is no number")
    if not adapter.patches and not adapter.embeddings:
        raise Unsupported("there is nothing in this file that a pipeline can load", hint="hubtool inspect FILE")
    check_name(name)
    if name in records(pipe) or name in _adapters(pipe):
        raise UsageProblem(f"something named {name!r} is loaded already", hint=f"hubtool.unload(pipe, {name!r}) first")
    if adapter.patches:
        check_unfused(pipe)
    family = family_of(pipe)
    if adapter.family and family and adapter.family != family:
        raise LoadMismatch(f"the adapter is for {adapter.family}, this {type(pipe).__name__} is {family}")


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
