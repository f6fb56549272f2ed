"""load, unload and save for a live diffusers pipeline, with whatever the library calls an adapter."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from hubtool.actions.library import reading
from hubtool.adapters.ir import Adapter
from hubtool.errors import FileMissing
from hubtool.pipelines import LoadReport, save, unload
from hubtool.pipelines import load as load_into
from hubtool.registry import browse

if TYPE_CHECKING:
    from hubtool.registry.records import Row

__all__ = ["LoadReport", "load", "save", "unload"]


class How(TypedDict, total=False):
    """What ``hubtool.pipelines.load`` can be told."""

    strength: float
    name: str | None
    trainable: bool
    token: str | Sequence[str] | None
    components: Collection[str] | None
    into: Mapping[str, str] | None
    collapse: bool | None
    settings: Mapping[str, Any]


def load(pipe: Any, ref: Adapter | str | Path, *, library: str | None = None, **how: Unpack[How]) -> LoadReport:
    """Load what ``ref`` names into ``pipe``: a path, an id, a hash prefix, or an ``Adapter``.

    ``how``, the checks and the errors are those of ``hubtool.pipelines.load``. Raises ``NotFound`` and ``AmbiguousRef``
    for a reference that the library cannot resolve, ``FileMissing`` when the file it names is gone.
    """
    return load_into(pipe, ref if isinstance(ref, Adapter) else _path(ref, library), **how)


def _path(ref: str | Path, library: str | None) -> Path:
    if isinstance(ref, Path) or os.path.lexists(ref):
        return Path(ref)
    with reading(library) as reader:
        return _present(browse.find(reader, ref))


def _present(row: Row) -> Path:
    place = next((place for place in row.places if place.state == "present"), None)
    if place is None:
        known = row.places[0].path if row.places else None
        raise FileMissing(
            "the library knows this artifact, but its file is not there now", path=known, hint="hubtool scan"
        )
    return Path(place.path)
