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
    """``present`` and ``active``: component -> adapter names. ``scaling``: (component, module) -> adapter -> scale times strength.

    ``trains``: the ``requires_grad`` flag of every parameter.
    """

    present: dict[str, set[str]]
    active: dict[str, list[str]]
    scaling: dict[tuple[str, str], dict[str, float]]
    trains: list[tuple[Any, bool]]


def observe(pipe: Any) -> Activity:
    """Remember the present state of all components."""
    models = live.components(pipe)
    return Activity(
        present={component: set(getattr(model, "peft_config", None) or ()) for component, model in models.items()},
        active={component: _active(model) for component, model in models.items()},
        scaling={(c, path): dict(layer.scaling) for c, model in models.items() for path, layer in live.layers(model)},
        trains=[(parameter, parameter.requires_grad) for model in models.values() for parameter in model.parameters()],
    )


def restore(pipe: Any, before: Activity, *, without: str) -> None:
    """Put everything back as it was, except adapter ``without``, which is gone."""
    activate(pipe, before, without=without)
    restore_scaling(pipe, before)
    restore_training(before.trains)


def activate(pipe: Any, before: Activity, *, added: str | None = None, without: str | None = None) -> None:
    """Make active what was active, and ``added``, but not ``without``.

    As diffusers does, a component also lists active adapters that it does not have: ``get_active_adapters`` reads one component only.
    """
    everywhere = dict.fromkeys(name for names in before.active.values() for name in names if name != without)
    for component, model in live.components(pipe).items():
        own, present = before.active[component], before.present[component]
        names = [name for name in everywhere if name in own or name not in present]
        for _, layer in live.layers(model):
            layer.set_adapter([*names, added] if added else names)


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


def _active(model: Any) -> list[str]:
    return next((list(layer.active_adapters) for _, layer in live.layers(model)), [])
