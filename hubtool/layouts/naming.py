"""Naming rows: how one outside vocabulary calls the modules of a component. Rows are compiled against a model's real modules.

A row's templates may hold ``{i}`` ``{j}`` ``{k}`` (any index, the same on both sides), ``{last}`` (the model's highest index there) and, at the
end, ``{*}`` (everything below). The first row that fits a module wins; a module that no row fits keeps its name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from hubtool.errors import TableError

OPS = frozenset({"rename", "rows", "swap_halves", "transpose"})
PARTS = "-parts"  # the naming of a fused weight's parts by number: qkv.0, qkv.1 (OneTrainer)
_NUMBER = re.compile(r"\d+")
_HOLE = re.compile(r"\{(last|[a-z*])\}")
_BELOW = ".{*}"
_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Place:
    """Where a naming keeps canonical modules. ``parts``: the canonical paths that ``outside`` holds, in row order (one unless ``op`` is ``rows``).

    ``parameters``: outside parameter -> canonical parameter, where they differ.
    """

    naming: str
    outside: str
    parts: tuple[str, ...]
    op: str = "rename"
    parameters: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def key(self) -> str:
        """What the outside module is called apart from any naming: its canonical path, or those of all its parts."""
        return "+".join(self.parts)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a naming table; templates on both sides."""

    outside: str
    parts: tuple[str, ...]
    op: str
    parameters: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Naming:
    """How one outside vocabulary calls the modules of a component. ``partial``: modules without a row do not exist there."""

    id: str
    component: str
    rows: tuple[Row, ...]
    partial: bool = False


def naming(name: str, body: Mapping[str, Any]) -> Naming:
    """Read one ``[naming.<name>]`` table; ``id`` says which naming it belongs to when another component has a table of its own. Raises ``TableError``."""
    rows = [*_rows(name, body.get("rows", ())), *_block_rows(body.get("blocks", ()))]
    return Naming(body.get("id", name), body["component"], tuple(rows), body.get("partial", False))


def _rows(name: str, rows: Mapping[str, str] | Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """A table of plain renames, or a list of rows."""
    if isinstance(rows, Mapping):
        rows = [{"outside": outside, "canonical": canonical} for outside, canonical in rows.items()]
    for row in rows:
        parts = row["canonical"]
        op = row.get("op", "rename")
        if op not in OPS or (op == "rows") != (not isinstance(parts, str)):
            raise TableError(f"naming {name}: {row['outside']}: op {op!r} does not fit {parts!r}")
        paths = (parts,) if isinstance(parts, str) else tuple(parts)
        yield Row(row["outside"], paths, op, MappingProxyType(row.get("parameters", {})))


def _block_rows(blocks: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """Pairs of blocks times the leaves below them (``"*"``: the same names below)."""
    for block in blocks:
        leaves = {"{*}": "{*}"} if block["leaves"] == "*" else block["leaves"]
        for outside, canonical in block["pairs"]:
            for outer, inner in leaves.items():
                yield Row(f"{outside}.{outer}", (f"{canonical}.{inner}",), "rename", MappingProxyType({}))


def compiled(table: Naming | None, modules: Collection[str]) -> dict[str, Place]:
    """canonical path -> its place in ``table`` for every module of a model (``partial`` tables: of the covered ones)."""
    if table is None:
        return {path: Place("diffusers", path, (path,)) for path in modules}
    finder = _Finder(table, modules)
    return {path: place for path in modules if (place := finder.place(path))}


def numbered(places: Mapping[str, Place]) -> dict[str, Place]:
    """The same naming with the parts of its fused modules told apart by number: ``qkv.0``."""
    return {path: _part(place, path) for path, place in places.items()}


def _part(place: Place, path: str) -> Place:
    if place.op != "rows":
        return replace(place, naming=place.naming + PARTS)
    outside = f"{place.outside}.{place.parts.index(path)}"
    return replace(place, naming=place.naming + PARTS, outside=outside, parts=(path,), op="rename")


class _Finder:
    """Rows by the shape of the paths they cover, so that a model of 1,700 modules tries a handful of rows each."""

    def __init__(self, table: Naming, modules: Collection[str]) -> None:
        self._table = table
        self._paths = modules
        self._exact: dict[str, list[tuple[Row, int]]] = {}
        self._below: dict[str, list[tuple[Row, int]]] = {}
        self._known: dict[str, list[tuple[Row, int]]] = {}
        for row in table.rows:
            for k, part in enumerate(row.parts):
                book = self._below if part.endswith(_BELOW) else self._exact
                book.setdefault(_shape_of(part.removesuffix(_BELOW)), []).append((row, k))

    def place(self, path: str) -> Place | None:
        for row, k in self._candidates(_shape_of(path)):
            holes = self._fit(row.parts[k], path)
            if holes is not None:
                parts = tuple(_fill(part, holes) for part in row.parts)
                return Place(self._table.id, _fill(row.outside, holes), parts, row.op, row.parameters)
        return None if self._table.partial else Place(self._table.id, path, (path,))

    def _candidates(self, shape: str) -> list[tuple[Row, int]]:
        known = self._known.get(shape)
        if known is None:
            heads = [shape[: found.start()] for found in re.finditer(r"\.", shape)] if self._below else []
            known = [*self._exact.get(shape, ()), *(row for head in heads for row in self._below.get(head, ()))]
            self._known[shape] = known
        return known

    def _fit(self, template: str, path: str) -> Mapping[str, str] | None:
        """What the holes of ``template`` hold for ``path``; None when it does not fit."""
        head = template.removesuffix(_BELOW)
        if "{" not in head:
            below = len(head) < len(template)
            return _rest(head, path) if below else (_NOTHING if path == head else None)
        found = _pattern(template).fullmatch(path)
        if found is None:
            return None
        holes = {name[1:]: text for name, text in found.groupdict().items()}
        return None if "last" in holes and int(holes["last"]) != self._last(template) else holes

    def _last(self, template: str) -> int:
        """The model's highest index where ``template`` says ``{last}``."""
        head = _pattern(template[: template.index("{last}")] + "{last}")
        hits = (head.match(path) for path in self._paths)
        return max((int(hit["_last"]) for hit in hits if hit), default=-1)


def _rest(head: str, path: str) -> Mapping[str, str] | None:
    return {"rest": path[len(head) + 1 :]} if path.startswith(head + ".") else None


def _shape_of(path: str) -> str:
    """The path with every index as ``#``: rows are looked up by it, so that a model of 1,700 modules tries a handful of rows each."""
    return _NUMBER.sub("#", _HOLE.sub("#", path))


def _fill(template: str, holes: Mapping[str, str]) -> str:
    for name, text in holes.items():
        template = template.replace("{*}" if name == "rest" else "{" + name + "}", text)
    return template


_PATTERNS: dict[str, re.Pattern[str]] = {}


def _pattern(template: str) -> re.Pattern[str]:
    known = _PATTERNS.get(template)
    if known is None:
        parts = _HOLE.split(template)
        text = "".join(_group(part) if k % 2 else re.escape(part) for k, part in enumerate(parts))
        known = _PATTERNS[template] = re.compile(text)
    return known


def _group(name: str) -> str:
    return "(?P<_rest>.+)" if name == "*" else rf"(?P<_{name}>\d+)"
