"""What a load did, and the memory of it that unloading and saving need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from hubtool.pipelines.kinds import Effect
from hubtool.types import Finding


@dataclass(frozen=True, slots=True)
class LoadReport:
    """``modules``: component -> live paths changed. ``tokens``: encoder -> tokens added. ``parameters``: what an optimizer may train.

    ``findings``: what the user should know, such as a token that was lower-cased. ``collapsed``: the change is in the weights
    themselves, so that ``pipe.set_adapters`` knows nothing of it; ``unload`` gives the weights their own bits back. ``kind``: of the
    file. ``negatives``: tokens that belong in the negative prompt.
    """

    name: str
    strength: float
    modules: Mapping[str, tuple[str, ...]]
    tokens: Mapping[str, tuple[str, ...]]
    parameters: tuple[Any, ...] = ()
    findings: tuple[Finding, ...] = ()
    collapsed: bool = False
    kind: str = "lora"
    negatives: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "strength": self.strength,
            "modules": {component: len(paths) for component, paths in self.modules.items()},
            "collapsed": self.collapsed,
            "tokens": {encoder: list(names) for encoder, names in self.tokens.items()},
            "negatives": list(self.negatives),
            "findings": [finding.to_json() for finding in self.findings],
        }


@dataclass(frozen=True, slots=True)
class Record:
    """``dtypes``: (component, path) -> dtype in the source. ``trains``: flags of the base weights, to put back on unloading.

    ``back``: the pipeline's component -> the adapter's own, where it was loaded into another. ``effect``: what acts from outside the weights.
    """

    report: LoadReport | None = None
    dtypes: Mapping[tuple[str, str], str] = field(default_factory=dict)
    trains: tuple[tuple[Any, bool], ...] = ()
    back: Mapping[str, str] = field(default_factory=dict)
    effect: Effect | None = None


# Weak: the memory goes with the pipeline. An adapter loaded by other means has no record, and unloads and saves without.
_RECORDS: WeakKeyDictionary[Any, dict[str, Record]] = WeakKeyDictionary()


def records(pipe: Any) -> dict[str, Record]:
    """What was loaded into ``pipe`` by name."""
    return _RECORDS.setdefault(pipe, {})


def effect_of(pipe: Any, name: str) -> Effect | None:
    """What acts from outside the weights as ``name``; None where nothing of that name does."""
    record = records(pipe).get(name)
    return None if record is None else record.effect
