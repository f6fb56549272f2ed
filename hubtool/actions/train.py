"""train: what ``hubtool.training`` does, with bases and adapters named by the library, and the result put into it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hubtool.actions.where import library_exists
from hubtool.errors import RegistryError
from hubtool.training import opening, quantised, whole
from hubtool.training.config import Config, digest
from hubtool.training.data.batches import Batches
from hubtool.training.data.items import collect
from hubtool.training.device import place
from hubtool.training.estimate import Estimate, estimate
from hubtool.training.loop import Step
from hubtool.training.methods import method
from hubtool.training.train import Trained
from hubtool.training.train import train as run


@dataclass(frozen=True, slots=True)
class Done:
    """``ids``: of the new artifacts in the library; ``warning``: why they are not there."""

    trained: Trained
    ids: tuple[str, ...] = ()
    warning: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {**self.trained.to_json(), "library_ids": list(self.ids), "warning": self.warning}


def _ignore(*told: object) -> None:
    """Nobody watches."""


def train(
    config: Config, pipe: Any = None, *, resume: bool = False, force: bool = False, library: str | None = None,
    watch: Callable[[Step], None] = _ignore, made: Callable[[], None] = _ignore,
) -> Done:  # fmt: skip
    """Train, and index the result with its lineage in the library.

    The errors are those of ``hubtool.training.train``. A library that is busy or outdated does not undo a training: it is only told.
    """
    config = located(config, library)
    trained = run(config, pipe, resume=resume, force=force, watch=watch, made=made)
    if not trained.leads:
        return Done(trained)
    try:
        return Done(trained, _record(trained, library))
    except RegistryError as error:
        return Done(trained, warning=f"the result is not in the library: {error.message}")


def plan(config: Config, library: str | None = None) -> Estimate:
    """What ``train`` would do and need. Raises what it would raise before training: for the base, the images, the captions."""
    opening.need_packages()
    config = located(config, library)
    chosen = method(config.method)
    chosen.check(config)
    whole.check(config, chosen.full)
    quantised.check(config)
    opening.check(config.base, chosen.families, chosen.name)
    own = Batches(collect(config.data.folder), config, config.tokens.names)
    return estimate(config, own, _precision(config))


def located(config: Config, library: str | None) -> Config:
    """``config`` with references to the library replaced by paths; what is a path or a repository stays."""
    base, start = (_path(one, library) for one in (config.base, config.adapter.start))
    return replace(config, base=base, adapter=replace(config.adapter, start=start))


def _path(ref: str, library: str | None) -> str:
    if not ref or os.path.lexists(ref) or "/" in ref or not library_exists(library):
        return ref
    from hubtool.actions.library import reading
    from hubtool.registry import browse

    with reading(library) as reader:
        row = browse.find(reader, ref)
    return next((place.path for place in row.places if place.state == "present"), ref)


def _precision(config: Config) -> str:
    kind = str(place(config.run).dtype).removeprefix("torch.")
    return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[kind]


def _record(trained: Trained, library: str | None) -> tuple[str, ...]:
    """Index the files; where the base is in the library too, it becomes their parent."""
    from hubtool.actions.library import open_store
    from hubtool.actions.lineage import record_output
    from hubtool.actions.scan import scan
    from hubtool.registry import browse
    from hubtool.registry.text import raw_path

    params = {"method": trained.config.method, "steps": trained.config.run.steps, "config": digest(trained.config)}
    parents = [path for path in (trained.config.base, trained.config.adapter.start) if path and Path(path).exists()]
    with open_store(library) as store:
        scan(store, [os.fspath(path.resolve()) for path in trained.written.files])
        for path in trained.written.files:
            record_output(store, path, parents, "train", params)
        found = [browse.at_path(store, raw_path(os.path.abspath(path))) for path in trained.written.files]
        return tuple(browse.by_key(store, one.artifact_id).id for one in found if one is not None)
