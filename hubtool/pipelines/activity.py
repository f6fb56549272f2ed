"""Which adapters are active, how strongly, and which parameters train: remembered before a change and put back after it.

diffusers and PEFT disturb all three: loading activates the new adapter alone, deleting the active one activates a neighbour,
activating makes factors trainable, injecting freezes the base weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hubtool.pipelines import live


@dataclass(frozen=True, slots=True)
class Activity:
    """``active``: component -> names; ``scaling``: (component, module) -> adapter -> scale times strength; ``trains``: parameter flags."""

    active: dict[str, list[str]]
    scaling: dict[tuple[str, str], dict[str, float]]
    trains: list[tuple[Any, bool]]


def observe(pipe: Any) -> Activity:
    """Remember the present state of all components."""
    scaling: dict[tuple[str, str], dict[str, float]] = {}
    active = {}
    for component, model in live.components(pipe).items():
        active[component] = _active(model)
        scaling |= {(component, path): dict(layer.scaling) for path, layer in live.layers(model)}
    models = live.components(pipe).values()
    return Activity(active, scaling, [(p, p.requires_grad) for model in models for p in model.parameters()])


def restore(pipe: Any, before: Activity, *, without: str | None = None) -> None:
    """Put everything back as it was, except adapter ``without``, which is gone."""
    for component in live.components(pipe):
        activate(pipe, component, [name for name in before.active[component] if name != without])
    restore_scaling(pipe, before)
    restore_training(before.trains)


def restore_scaling(pipe: Any, before: Activity) -> None:
    """Give the adapters that were there before their scale in every module again."""
    for component, model in live.components(pipe).items():
        for path, layer in live.layers(model):
            known = before.scaling.get((component, path), {})
            layer.scaling.update({name: scale for name, scale in known.items() if name in layer.scaling})


def restore_training(trains: Iterable[tuple[Any, bool]]) -> None:
    """Put the ``requires_grad`` flags back."""
    for parameter, flag in trains:
        parameter.requires_grad_(flag)


def activate(pipe: Any, component: str, names: list[str]) -> None:
    """Make exactly ``names`` active in every wrapped module of ``component``, each keeping its scale."""
    for _, layer in live.layers(live.components(pipe)[component]):
        layer.set_adapter(names)


def _active(model: Any) -> list[str]:
    return next((list(layer.active_adapters) for _, layer in live.layers(model)), [])
