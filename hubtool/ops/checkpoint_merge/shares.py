"""From strengths as they are given to the numbers a method gets for one module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from hubtool.errors import UsageProblem
from hubtool.ops.methods import Method
from hubtool.ops.strengths import Strengths

Given = Sequence[Strengths | None]
T = TypeVar("T")


def spread(given: Sequence[T | None], count: int) -> list[T | None]:
    """One for each of ``count`` inputs, None where nothing was said: as many, one less (for all but the first), or one for all.

    Raises ``UsageProblem`` for any other number.
    """
    if len(given) == count:
        return list(given)
    if not given:
        return [None] * count
    if len(given) == count - 1:
        return [None, *given]
    if len(given) == 1:
        return [given[0]] * count
    text = f"{len(given)} strengths for {count} inputs"
    raise UsageProblem(text, hint=f"give {count}, {count - 1} or 1, in the order of the inputs")


def arranged(given: Given, count: int, method: Method) -> list[Strengths | None]:
    """What each input counts; None for the one that gets the rest of the shares, or whose strength means nothing."""
    own = spread(given, count)
    if method.weights == "none":
        if any(one is not None for one in own):
            raise UsageProblem(f"method {method.id} takes no strengths")
        return own
    silent = own.count(None)
    if method.weights == "shares" and silent == 1:
        return own
    if method.weights == "shares" and silent not in (0, count):
        raise UsageProblem(f"{silent} inputs have no strength", hint="only one can take what the others leave")
    return [one or Strengths() for one in own]


def weights(strengths: Given, component: str, path: str, method: Method) -> tuple[float, ...]:
    """The method's weights for one module: shares add up to 1. Raises ``UsageProblem`` where they add up to nothing."""
    own = [None if one is None else one.of(component, path) for one in strengths]
    if method.weights != "shares":
        return tuple(1.0 if value is None else value for value in own)
    total = sum(value for value in own if value is not None)
    if None in own:
        return tuple(1.0 - total if value is None else value for value in own)
    if not total:
        text = f"the strengths of {component}.{path} add up to 0"
        raise UsageProblem(text, hint="leave out that of one input, and it takes the rest")
    return tuple((value or 0.0) / total for value in own)
