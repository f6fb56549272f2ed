"""State dicts of whole models under any naming, small enough to convert hundreds of them: all rows, one column.

Every number occurs once, so that a converted state dict shows where each row went. An oracle of its own: it knows the places of the
vocabulary and nothing of the code that converts files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from hubtool.layouts import tables, vocabulary
from hubtool.layouts.naming import Place

if TYPE_CHECKING:
    from torch import Tensor

Case = tuple[str, str, str, str]  # family, naming, component, model


def cases() -> Iterator[Case]:
    """Every naming of every family with every model that it names."""
    for family in tables.family_ids():
        for naming in tables.family(family).naming_tables:
            for size in vocabulary.models(family, naming.component):
                yield family, naming.id, naming.component, size


def canonical(size: str) -> dict[str, Tensor]:
    """The state dict of a model: a parameter of shape (rows, ...) becomes (rows, 1, ...)."""
    import torch

    state: dict[str, Tensor] = {}
    start = 0
    for path, shapes in vocabulary.model(size).items():
        for name, shape in shapes.items():
            rows = shape[0] if shape else 1
            state[joined(path, name)] = torch.arange(start, start + rows).reshape(rows, *[1] * (len(shape) - 1))
            start += rows
    return state


def outside(case: Case, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers under a naming: the inverse of what a reader of the original checkpoint does."""
    family, naming, component, size = case
    found: dict[str, Tensor] = {}
    for place in vocabulary.places(family, naming, component, size).values():
        back = {inner: outer for outer, inner in place.parameters.items()}
        for name in vocabulary.model(size)[place.parts[0]]:
            parts = [state[joined(part, name)] for part in place.parts]
            found[joined(place.outside, back.get(name, name))] = _OPS[place.op](parts)
    return found


def _stacked(parts: list[Tensor]) -> Tensor:
    import torch

    return torch.cat(parts)


def _swapped(parts: list[Tensor]) -> Tensor:
    first, second = parts[0].chunk(2)
    return _stacked([second, first])


_OPS: Mapping[str, Callable[[list[Tensor]], Tensor]] = {
    "rename": lambda parts: parts[0],
    "rows": _stacked,
    "swap_halves": _swapped,
    "transpose": lambda parts: parts[0].T,
}


def keys(place: Place, size: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(outside key, canonical keys it holds) of every parameter of a place."""
    back = {inner: outer for outer, inner in place.parameters.items()}
    for name in vocabulary.model(size)[place.parts[0]]:
        yield joined(place.outside, back.get(name, name)), tuple(joined(part, name) for part in place.parts)


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a whole model under a naming."""
    family, naming, component, size = case
    state: dict[str, tuple[int, ...]] = {}
    for path, table in vocabulary.model(size).items():
        state |= {joined(path, name): tuple(shape) for name, shape in table.items()}
    found: dict[str, tuple[int, ...]] = {}
    for place in vocabulary.places(family, naming, component, size).values():
        for key, parts in keys(place, size):
            rest = state[parts[0]]
            found[key] = (sum(state[part][0] for part in parts), *rest[1:]) if len(parts) > 1 else rest
    return found


def joined(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter
