"""load and unload: every check first, then the pipeline's own API, then a count of what changed."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hubtool.adapters.ir import Adapter
from hubtool.errors import BadValues, Unsupported, UsageProblem
from hubtool.pipelines import live
from hubtool.pipelines.activity import observe, restore_training
from hubtool.pipelines.lora import Plans, check_name, check_unfused, load_layers, unload_layers
from hubtool.pipelines.plan import plan
from hubtool.pipelines.report import LoadReport, Record, records
from hubtool.pipelines.source import read
from hubtool.pipelines.tokens import load_tokens, plan_tokens, unload_tokens


def load(
    pipe: Any,
    source: Adapter | str | Path,
    *,
    strength: float = 1.0,
    name: str | None = None,
    trainable: bool = False,
    token: str | Sequence[str] | None = None,
    components: Collection[str] | None = None,
) -> LoadReport:
    """Load an adapter (low-rank factors, token embeddings, or both) into a diffusers pipeline, beside those that are active.

    ``source``: a file or an ``Adapter``. ``strength``: the user's factor on every delta. ``name``: by default the file's stem.
    ``trainable``: hand over the factors as fp32 parameters in ``LoadReport.parameters``, the base weights frozen.
    ``token``: what prompts shall call the embeddings. ``components``: only these, for instance ``["unet"]``.

    Everything is checked before anything changes, and a load that changed other modules than planned is taken back. Raises
    ``Unsupported``, ``ShapeMismatch``, ``BadValues``, ``LoadMismatch``, ``UsageProblem``, and what reading the file raises.
    """
    if not math.isfinite(strength):
        raise BadValues(f"a strength of {strength} is no number")
    adapter = read(source, live.family_of(pipe))
    name = _free_name(pipe, source) if name is None else name
    _check(pipe, adapter, name)
    plans = plan(pipe, adapter, components, trainable=trainable)
    token_plans, findings = plan_tokens(pipe, adapter, token)
    _check_asked(plans, strength, trainable)
    before = observe(pipe)
    with ExitStack() as undo:
        parameters = load_layers(pipe, plans, name, strength, trainable=trainable) if plans else []
        if plans:
            undo.callback(unload_layers, pipe, name)
        tokens = load_tokens(pipe, token_plans)
        undo.pop_all()
    modules = {component: tuple(one.path for one in layers) for component, layers in plans.items()}
    report = LoadReport(name, strength, modules, tokens, tuple(parameters) if trainable else (), tuple(findings))
    dtypes = {(one.component, one.path): one.dtype for layers in plans.values() for one in layers}
    records(pipe)[name] = Record(report, dtypes, tuple(before.trains) if trainable else ())
    return report


def unload(pipe: Any, name: str) -> None:
    """Remove what was loaded as ``name``: factors, wrappers, tokens. The base weights have the bits they had before loading.

    ``name`` may also be a token, or an adapter that was loaded by other means. Raises ``UsageProblem`` when there is none, or while
    adapters are fused.
    """
    record = records(pipe).get(name)
    tokens = dict(record.report.tokens) if record else _tokens_called(pipe, name)
    loaded = name in live.adapter_names(pipe)
    if not loaded and not tokens:
        present = sorted({*live.adapter_names(pipe), *records(pipe)})
        raise UsageProblem(f"nothing named {name!r} is loaded", hint=f"loaded: {', '.join(present) or 'nothing'}")
    if loaded:
        check_unfused(pipe)
        unload_layers(pipe, name)
    unload_tokens(pipe, tokens)
    if record and record.trains:
        restore_training(record.trains)
    records(pipe).pop(name, None)


def _check(pipe: Any, adapter: Adapter, name: str) -> None:
    if not adapter.patches and not adapter.embeddings:
        raise Unsupported("there is nothing in this file that a pipeline can load", hint="hubtool inspect FILE")
    check_name(pipe, name)
    if name in records(pipe):
        raise UsageProblem(f"something named {name!r} is loaded already", hint=f"hubtool.unload(pipe, {name!r}) first")
    if adapter.patches:
        check_unfused(pipe)


def _check_asked(plans: Plans, strength: float, trainable: bool) -> None:
    if not plans and trainable:
        raise Unsupported(
            "token embeddings alone are not handed over for training", hint="hubtool train textual_inversion"
        )
    if not plans and strength != 1.0:
        raise UsageProblem("token embeddings have no strength: their vectors are used as they are")


def _free_name(pipe: Any, source: Adapter | str | Path) -> str:
    stem = "adapter" if isinstance(source, Adapter) else Path(source).stem
    plain = re.sub(r"\W+", "_", stem).strip("_") or "adapter"
    plain = plain if plain.isidentifier() else f"adapter_{plain}"
    names = itertools.chain([plain], (f"{plain}_{i}" for i in itertools.count(2)))
    taken = {*live.adapter_names(pipe), *records(pipe)}
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
