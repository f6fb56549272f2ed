"""The coefficients of methods whose result is a sum of the inputs' changes times numbers.

A linear method is asked what it makes of unit vectors; one that knows only lengths and angles (``ISOMETRIC``) is given any vectors with the
same inner products. So the formulas stay in ``hubtool.ops.methods``, and no change is ever formed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from hubtool.ops.methods import Method, find

ISOMETRIC = frozenset({"slerp", "model_stock", "geometric_median", "orthogonalise"})


def combines(method: Method) -> bool:
    """Whether the method's result is a sum of the changes times numbers."""
    return method.linear or method.id in ISOMETRIC


def plain(
    method: Method, weights: Sequence[float], params: Mapping[str, Any], *, based: bool = False
) -> tuple[float, ...]:
    """The coefficients of a linear method; those of the base, where there is one, come last."""
    return _plain(method.id, tuple(weights), tuple(sorted(params.items())), based)


@lru_cache(1024)
def _plain(
    name: str, weights: tuple[float, ...], params: tuple[tuple[str, Any], ...], based: bool
) -> tuple[float, ...]:
    """Most modules of a file have the same strengths."""
    import torch

    vectors = list(torch.eye(len(weights) + based, dtype=torch.float64))
    return _applied(find(name), vectors, weights, dict(params), based)


def found(
    method: Method,
    gram: Sequence[Sequence[float]],
    weights: Sequence[float],
    params: Mapping[str, Any],
    *,
    based: bool = False,
) -> tuple[float, ...]:
    """The coefficients of an isometric method. ``gram``: inner products of all changes, the base's last."""
    import torch

    values, vectors = torch.linalg.eigh(torch.tensor(gram, dtype=torch.float64))
    alike = list(vectors * values.clamp_min(0).sqrt())
    assert method.survey is not None
    inputs, base = (alike[:-1], alike[-1]) if based else (alike, None)
    state = method.survey(lambda: iter(((inputs, base),)), weights=tuple(weights), **method.checked(params))
    units = list(torch.eye(len(alike), dtype=torch.float64))
    return _applied(method, units, weights, params, based, state=state)


def _applied(
    method: Method,
    vectors: Sequence[Any],
    weights: Sequence[float],
    params: Mapping[str, Any],
    based: bool,
    **state: Any,
) -> tuple[float, ...]:
    inputs, base = (vectors[:-1], vectors[-1]) if based else (vectors, None)
    result = method.function(list(inputs), weights=tuple(weights), base=base, **method.checked(params), **state)
    return tuple(result.tolist())
