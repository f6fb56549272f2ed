"""Schedules in words: ``linear:1:0.2``, ``cosine:0:1``, ``phases:0:1,0.6:0.3``, ``list:1,1,0.5``."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MappingProxyType

from hubtool.errors import UsageProblem
from hubtool.pipelines.schedules import Curve, CurveLike, cosine, linear, phases

_HINT = "linear:1:0.2, cosine:0:1, phases:0:1,0.6:0.3 or list:1,1,0.5"


def curve(text: str, strength: float = 1.0) -> CurveLike:
    """What ``text`` says, every value multiplied by ``strength``. Raises ``UsageProblem`` for words that mean nothing."""
    kind, _, rest = text.partition(":")
    if kind not in _KINDS:
        raise UsageProblem(f"{text!r} is no schedule", hint=_HINT)
    try:
        found = _KINDS[kind](rest)
    except ValueError:
        raise UsageProblem(f"{text!r} is no schedule", hint=_HINT) from None
    if isinstance(found, list):
        return [strength * value for value in found]
    return lambda step, steps: strength * found(step, steps)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _ends(text: str) -> tuple[float, float]:
    start, end = map(_number, text.split(":"))
    return start, end


def _linear(text: str) -> Curve:
    return linear(*_ends(text))


def _cosine(text: str) -> Curve:
    return cosine(*_ends(text))


def _phases(text: str) -> Curve:
    return phases(dict(_ends(part) for part in text.split(",")))


def _list(text: str) -> list[float]:
    return [_number(value) for value in text.split(",")]


_KINDS: MappingProxyType[str, Callable[[str], Curve | list[float]]] = MappingProxyType(
    {"linear": _linear, "cosine": _cosine, "phases": _phases, "list": _list}
)
