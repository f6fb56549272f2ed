"""Sentinel tables: ``schemas/checkpoints.toml`` and ``schemas/components.toml``, compiled once, tested in file order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from hubtool import resources
from hubtool.errors import TableError
from hubtool.tensors.ref import TensorRef
from hubtool.types import Shape

Tensors = Mapping[str, TensorRef]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table. ``have`` pairs keys with shapes in which 0 fits any size and ``()`` any shape."""

    family: str | None
    candidates: tuple[str, ...]
    variant: str | None
    layout: str | None
    component: str
    have: tuple[tuple[str, Shape], ...]
    lack: tuple[str, ...]
    some: tuple[str, ...]
    start: tuple[str, ...]
    families: tuple[str, ...]
    width: str | None
    resized: bool
    prefixes: tuple[str, ...]
    firsts: tuple[tuple[str, str], ...]  # (prefix, prefix + first key): one look-up decides most rows


@dataclass(frozen=True, slots=True)
class Hit:
    """A row that fits, and the prefix under which its keys were found."""

    row: Row
    prefix: str

    def evidence(self, tensors: Tensors) -> tuple[str, ...]:
        """The sentinel keys with the shapes they have in the file."""
        keys = [self.prefix + key for key, _ in self.row.have]
        return tuple(f"{key} of shape {list(tensors[key].shape)}" for key in keys)


@dataclass(frozen=True, slots=True)
class CheckpointTable:
    rows: tuple[Row, ...]
    variants: tuple[Row, ...]
    flags: tuple[tuple[str, tuple[str, ...]], ...]
    components: tuple[tuple[str, str, tuple[str, ...]], ...]  # prefix, name, families; most specific first
    counts: Mapping[str, Mapping[str, int]]
    pipelines: tuple[tuple[str, tuple[str, ...]], ...]  # beginning of a pipeline class's name, families; longest first


@cache
def checkpoints() -> CheckpointTable:
    """The table of whole checkpoints."""
    doc = resources.table("checkpoints.toml")
    prefixes = tuple(doc["prefixes"])
    parts = [(part["prefix"], part["name"], tuple(part.get("families", ()))) for part in doc["component"]]
    return CheckpointTable(
        rows=tuple(_row(row, prefixes) for row in doc["row"]),
        variants=tuple(_row(row, ("",)) for row in doc["variant"]),
        flags=tuple((flag["name"], tuple(flag["keys"])) for flag in doc["flag"]),
        components=tuple(sorted(parts, key=lambda part: (-len(part[0]), not part[2]))),
        counts=MappingProxyType(doc["counts"]),
        pipelines=tuple(
            (name, tuple(doc["pipelines"][name])) for name in sorted(doc["pipelines"], key=len, reverse=True)
        ),
    )


@cache
def components(kind: str) -> tuple[Row, ...]:
    """The rows of one kind of ``components.toml``."""
    return tuple(_row(row, ("",)) for row in _component_doc()[kind])


def families_by_width(tensors: Tensors, hit: Hit) -> tuple[str, ...]:
    """Families whose cross attention is as wide as the row's ``width`` tensor; empty when it is absent or unknown."""
    ref = tensors.get(f"{hit.prefix}{hit.row.width}") if hit.row.width else None
    if ref is None or not ref.shape:
        return ()
    return tuple(_component_doc()["by_width"]["cross_attention"].get(str(ref.shape[-1]), ()))


def first_hit(tensors: Tensors, rows: Iterable[Row]) -> Hit | None:
    """The first row that fits, or None."""
    for row in rows:
        for prefix, key in row.firsts:
            if key in tensors and fits(tensors, row, prefix):
                return Hit(row, prefix)
        if row.start and next(iter(tensors), "").startswith(row.start):
            return Hit(row, "")
    return None


def fits(tensors: Tensors, row: Row, prefix: str) -> bool:
    """Whether a row's conditions hold for the keys behind ``prefix``."""
    if not all(_same(tensors.get(prefix + key), shape) for key, shape in row.have):
        return False
    return not any(prefix + key in tensors for key in row.lack) and (not row.some or _some(tensors, row.some))


def _same(ref: TensorRef | None, shape: Shape) -> bool:
    if ref is None or not shape:
        return ref is not None
    return len(ref.shape) == len(shape) and all(want in (0, size) for want, size in zip(shape, ref.shape, strict=True))


def _some(tensors: Tensors, words: tuple[str, ...]) -> bool:
    return any(word in key for key in tensors for word in words)


@cache
def _component_doc() -> dict[str, Any]:
    return resources.table("components.toml")


def _row(row: Mapping[str, Any], prefixes: tuple[str, ...]) -> Row:
    have = tuple((key, tuple(shape)) for key, shape in row.get("have", {}).items())
    if not have and not row.get("start"):
        raise TableError(f"a row needs `have` or `start`: {dict(row)}")
    tried = tuple(row.get("prefixes", prefixes))
    return Row(
        family=row.get("family"),
        candidates=tuple(row.get("candidates", ())),
        variant=row.get("variant", row.get("name")),
        layout=row.get("layout", row.get("naming")),
        component=row.get("component", ""),
        have=have,
        lack=tuple(row.get("lack", ())),
        some=tuple(row.get("some", ())),
        start=tuple(row.get("start", ())),
        families=tuple(row.get("families", ())),
        width=row.get("width"),
        resized=bool(row.get("resized", False)),
        prefixes=tried,
        firsts=tuple((prefix, prefix + have[0][0]) for prefix in tried) if have else (),
    )
