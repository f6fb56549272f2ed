"""How the output of an operation gets its lineage into the library: only where the library knows one of its parents."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubtool.actions.library import open_store, reading
from hubtool.actions.trees import file_sha256
from hubtool.actions.where import default_target, library_exists
from hubtool.registry import browse
from hubtool.registry.text import raw_path
from hubtool.version import __version__

if TYPE_CHECKING:  # SQLAlchemy: not for an output whose parents the library does not know
    from hubtool.registry.lineage import Parent
    from hubtool.registry.store import Store


def record_conversion(
    library: str | None,
    output: str | Path,
    parents: Sequence[str | Path],
    op: str,
    params: Mapping[str, Any] | None = None,
) -> str | None:
    """``record_output`` for a caller that has no open library. A library that does not exist is not made, an unconcerned one not written."""
    if not library_exists(library):
        return None
    target = default_target(library)
    with reading(target) as reader:
        known = any(browse.at_path(reader, raw_path(os.path.abspath(parent))) for parent in parents)
    if not known:
        return None
    with open_store(target) as store:
        return record_output(store, output, parents, op, params)


def record_output(
    store: Store, output: str | Path, parents: Sequence[str | Path], op: str, params: Mapping[str, Any] | None = None,
    *, strengths: Sequence[float | None] = (),
) -> str | None:  # fmt: skip
    """Record that ``output`` was made from ``parents`` by ``op`` (``convert``, ``merge``, ``extract`` ...); the id of the output.

    Does nothing and returns None when none of the parents is in the library. The output is indexed and hashed if it is not yet;
    parents that the library does not know are named by their SHA256.
    """
    from hubtool.actions.scan import scan
    from hubtool.registry import lineage

    found = [browse.at_path(store, raw_path(os.path.abspath(parent))) for parent in parents]
    if not any(found):
        return None
    scan(store, [os.fspath(output)])
    child = browse.at_path(store, raw_path(os.path.abspath(output)))
    if child is None:
        return None
    given = [*strengths, *[None] * (len(parents) - len(strengths))]
    edges = [
        _parent(store, place.artifact_id if place else None, path, strength)
        for path, place, strength in zip(parents, found, given, strict=True)
    ]
    lineage.record(store, child.artifact_id, edges, op, params or {}, _tool())
    return browse.by_key(store, child.artifact_id).id


def _parent(store: Store, key: int | None, path: str | Path, strength: float | None) -> Parent:
    from hubtool.registry.lineage import Parent

    known = browse.by_key(store, key).sha256 if key is not None else None
    return Parent(known or _sha256(path) or os.path.abspath(path), key, strength)


def _sha256(path: str | Path) -> str | None:
    return file_sha256(path) if os.path.isfile(path) else None


def _tool() -> str:
    return f"hubtool {__version__}"
