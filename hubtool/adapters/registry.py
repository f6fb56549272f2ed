"""From an algorithm and its tensors to the kind that does its algebra. Which kind that is, schemas/algorithms.toml says."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any, NamedTuple

from hubtool import resources
from hubtool.adapters.ir import Patch
from hubtool.errors import TableError
from hubtool.tensors.expr import Expr


class Row(NamedTuple):
    """An algorithm in one of its spellings. ``kind``: the module of ``hubtool.adapters``. ``flavours``: prefix of a key -> the trainer
    whose reading of the same tensors applies."""

    id: str
    kind: str
    sets: tuple[frozenset[str], ...]
    flavours: Mapping[str, str]


@cache
def rows() -> tuple[Row, ...]:
    """The rows of schemas/algorithms.toml, in the order in which a module is tried. Raises ``TableError``."""
    try:
        listed = resources.table("algorithms.toml")["algorithm"]
        return tuple(
            Row(row["id"], row["kind"], tuple(map(frozenset, row["sets"])), row.get("flavours", {})) for row in listed
        )
    except KeyError as error:
        raise TableError(f"algorithms.toml: a row lacks {error}") from error


@cache
def constructor(kind: str) -> Any:
    """What makes a patch of ``kind`` from its roles. Imported when first asked for."""
    return importlib.import_module(f"hubtool.adapters.{kind}").PATCH


def make(
    algorithm: str, tensors: Mapping[str, Expr], alpha_value: float | None = None, *, flavour: str | None = None
) -> Patch:
    """The patch of one module: role -> tensor as ``algorithm_of`` found them complete, and the value of alpha where there is one.

    ``flavour`` tells apart trainers that mean different things by the same tensors (``kohya`` for OFT). Unchecked: call ``check``.
    Raises ``CorruptFile`` where the tensors cannot even be taken for the kind's.
    """
    row = _row(algorithm, tensors)
    extra = {} if flavour is None else {"flavour": flavour}
    patch: Patch = constructor(row.kind)(**tensors, alpha_value=alpha_value, **extra)
    return patch


def flavour_of(algorithm: str, tensors: Mapping[str, Expr], key: str) -> str | None:
    """The flavour that the spelling of a module's ``key`` implies; None where all trainers agree."""
    flavours = _row(algorithm, tensors).flavours
    return next((flavour for prefix, flavour in flavours.items() if key.startswith(prefix)), None)


def _row(algorithm: str, tensors: Mapping[str, Expr]) -> Row:
    return _row_of(algorithm, frozenset(tensors))


@lru_cache(1024)
def _row_of(algorithm: str, roles: frozenset[str]) -> Row:
    candidates = [row for row in rows() if row.id == algorithm]
    fitting = [row for row in candidates if any(complete <= roles for complete in row.sets)]
    if not fitting:
        raise TableError(f"no row of algorithms.toml makes {algorithm} of {', '.join(sorted(roles))}")
    return fitting[0]
