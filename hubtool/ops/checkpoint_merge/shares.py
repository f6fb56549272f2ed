"""From strengths as they are given to the numbers a method gets for one module."""

from __future__ import annotations

from collections.abc import Sequence

from hubtool.errors import UsageProblem
from hubtool.ops.methods import Method
from hubtool.ops.strengths import Strengths

Given = Sequence[Strengths | None]


def arranged(given: Given, count: int, method: Method) -> list[Strengths | None]:
    """One for each of ``count`` inputs; None is what is left for the first, or no say at all. Raises ``UsageProblem`` for a number that fits none.

    For shares and for methods that change the first input, strengths may be given for the others only; where every change counts alike,
    one is for all.
    """
    if method.weights == "none":
        if given:
            raise UsageProblem(f"method {method.id} takes no strengths")
        return [None] * count
    if len(given) == count:
        return list(given)
    if not given:
        return [Strengths()] * count if method.weights != "others" else [None, *[Strengths()] * (count - 1)]
    if len(given) == count - 1 and method.weights in ("shares", "others"):
        return [None, *given]
    if len(given) == 1 and method.weights == "each":
        return [given[0]] * count
    allowed = {"shares": f"{count} or {count - 1}", "others": f"{count} or {count - 1}", "each": f"{count} or 1"}
    raise UsageProblem(
        f"{len(given)} strengths for {count} inputs", hint=f"give {allowed[method.weights]}, in the order of the inputs"
    )


def weights(strengths: Sequence[Strengths | None], component: str, path: str, method: Method) -> tuple[float, ...]:
    """The method's weights for one module: shares add up to 1. Raises ``UsageProblem`` where they add up to nothing."""
    own = [None if one is None else one.of(component, path) for one in strengths]
    if method.weights != "shares":
        return tuple(1.0 if value is None else value for value in own)
    given = [value for value in own if value is not None]
    if len(given) < len(own):
        return (1.0 - sum(given), *given)
    total = sum(given)
    if not total:
        raise UsageProblem(
            f"the strengths of {component}.{path} add up to 0", hint="give one input less, and the first takes the rest"
        )
    return tuple(value / total for value in given)
