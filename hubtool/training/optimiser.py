"""Optimisers by name, and learning rates by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from hubtool.errors import MissingExtra
from hubtool.training.config import Optimiser
from hubtool.training.parts.base import Group

# name -> (class, the words of the configuration that it takes)
_CLASSES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "adamw": ("torch.optim:AdamW", ("betas", "eps")),
    "adafactor": ("torch.optim:Adafactor", ()),
    "sgd": ("torch.optim:SGD", ()),
    "adamw8bit": ("bitsandbytes.optim:AdamW8bit", ("betas", "eps")),
    "prodigy": ("prodigyopt:Prodigy", ("betas", "eps")),
}


def make(groups: Sequence[Group], settings: Optimiser) -> Any:
    """An optimiser over all groups, in order. Raises ``MissingExtra``."""
    home, words = _CLASSES[settings.name]
    module, _, name = home.partition(":")
    try:
        cls = getattr(import_module(module), name)
    except ImportError:
        error = MissingExtra(f"the optimiser {settings.name}", "train")
        error.hint = f"pip install {module.partition('.')[0]}"  # too large, or too rare, for the extra
        raise error from None
    given = {"betas": tuple(settings.betas), "eps": settings.epsilon}
    rows = [
        {"params": list(group.parameters.values()), "lr": group.rate, "weight_decay": group.decay} for group in groups
    ]
    return cls(rows, **{word: given[word] for word in words})


def factor(settings: Optimiser, step: int, steps: int) -> float:
    """What multiplies every rate at ``step`` of ``steps``: rises over ``warmup`` steps, then follows the schedule."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, steps - settings.warmup)
    return settings.final + (1.0 - settings.final) * _SCHEDULES[settings.schedule](min(done, 1.0), settings.cycles)


def _cosine(done: float, cycles: int) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * done))


_SCHEDULES: Mapping[str, Callable[[float, int], float]] = {
    "constant": lambda done, cycles: 1.0,
    "linear": lambda done, cycles: 1.0 - done,
    "cosine": _cosine,
    "restarts": lambda done, cycles: _cosine((done * cycles) % 1.0 if done < 1.0 else 1.0, 1),
    "polynomial": lambda done, cycles: (1.0 - done) ** 2,
}


def set_rates(optimiser: Any, groups: Sequence[Group], share: float, moving: frozenset[str]) -> None:
    """Give each group its rate; the gradients of groups that do not move are dropped, so that not even their moments change."""
    for row, group in zip(optimiser.param_groups, groups, strict=True):
        row["lr"] = group.rate * share
        if group.name not in moving:
            for parameter in row["params"]:
                parameter.grad = None
