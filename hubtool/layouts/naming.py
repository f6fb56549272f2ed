"""Naming rows: how one outside vocabulary calls the modules of a component. Rows are compiled against a model's real modules.

A row's templates may hold ``{i}`` ``{j}`` ``{k}`` (any index, the same on both sides), ``{last}`` (the model's highest index there) and, at the
end, ``{*}`` (everything below). The first row that fits a module wins; a module that no row fits keeps its name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from hubtool.errors import TableError

OPS = frozenset({"rename", "rows", "swap_halves", "transpose"})
PARTS = "-parts"  # the naming of a fused weight's parts by number: qkv.0, qkv.1 (OneTrainer)
_NUMBER = re.compile(r"\d+")
_TOKEN = re.compile(r"\{(?:last|[a-z])\}|\d+")
_LAST, _REST = "{last}", "{*}"
_BELOW = "." + _REST
_NOTHING: Mapping[str, str] = MappingProxyType({})


class Place(NamedTuple):
    """Where a naming keeps canonical modules. ``parts``: the canonical paths that ``outside`` holds, in row order (one unless ``op`` is ``rows``).

    ``parameters``: outside parameter -> canonical parameter, where they differ.
    """

    naming: str
    outside: str
    parts: tuple[str, ...]
    op: str = "rename"
    parameters: Mapping[str, str] = _NOTHING

    @property
    def key(self) -> str:
        """What the outside module is called apart from any naming: its canonical path, or those of all its parts."""
        return "+".join(self.parts)


class Row(NamedTuple):
    """One line of a naming table; templates on both sides."""

    outside: str
    parts: tuple[str, ...]
    op: str
    parameters: Mapping[str, str]


class Naming(NamedTuple):
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
        yield Row(row["outside"], paths, op, MappingProxyType(row["parameters"]) if "parameters" in row else _NOTHING)


def _block_rows(blocks: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """Pairs of blocks times the leaves below them (``"*"``: the same names below)."""
    for block in blocks:
        leaves = {"{*}": "{*}"} if block["leaves"] == "*" else block["leaves"]
        for outside, canonical in block["pairs"]:
            for outer, inner in leaves.items():
                yield Row(f"{outside}.{outer}", (f"{canonical}.{inner}",), "rename", _NOTHING)


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
        return place._replace(naming=place.naming + PARTS)
    outside = f"{place.outside}.{place.parts.index(path)}"
    return place._replace(naming=place.naming + PARTS, outside=outside, parts=(path,), op="rename")


class _Candidate(NamedTuple):
    """A row and one of its canonical sides. ``rank``: its place in the table; ``tokens``: the numbers and holes of ``head``, none without holes."""

    rank: int
    row: Row
    head: str
    tokens: tuple[str, ...]


_Book = dict[str, list[_Candidate]]


class _Finder:
    """Rows by the paths they cover, or by their shape where they have holes: a model of 1,700 modules tries a handful of rows each.

    Two templates of one shape differ in their numbers alone, so that numbers are all there is to compare.
    """

    def __init__(self, table: Naming, modules: Collection[str]) -> None:
        self._table = table
        self._paths = modules
        self._exact: _Book = {}
        self._below: _Book = {}
        self._holed = False
        sides = [(row, part) for row in table.rows for part in row.parts]
        for rank, (row, template) in enumerate(sides):
            head = template.removesuffix(_BELOW)
            holed = "{" in head
            one = _Candidate(rank, row, head, tuple(_TOKEN.findall(head)) if holed else ())
            book = self._exact if head == template else self._below
            book.setdefault(_TOKEN.sub("#", head) if holed else head, []).append(one)
            self._holed |= holed

    def place(self, path: str) -> Place | None:
        shape = _NUMBER.sub("#", path) if self._holed else path
        for candidates, below in self._candidates(path, shape):
            for one in candidates:
                holes = self._holes(one, path)
                if holes is not None:
                    return self._made(one, path, holes, below)
        return None if self._table.partial else Place(self._table.id, path, (path,))

    def _candidates(self, path: str, shape: str) -> Iterator[tuple[list[_Candidate], bool]]:
        """Rows for the very path, then those for what lies below a shorter one, the shortest first."""
        yield _listed(self._exact, path, shape), False
        at = end = -1
        while self._below and (at := path.find(".", at + 1)) >= 0:
            end = shape.find(".", end + 1)
            yield _listed(self._below, path[:at], shape[:end]), True

    def _holes(self, one: _Candidate, path: str) -> dict[str, str] | None:
        """hole -> number, for a path of the row's shape; None where a number differs from the template's own."""
        holes: dict[str, str] = {}
        for token, number in zip(one.tokens, _NUMBER.findall(path) if one.tokens else (), strict=False):
            if token[0] == "{":
                holes[token] = number
            elif token != number:
                return None
        return None if _LAST in holes and int(holes[_LAST]) != self._last(one.head) else holes

    def _made(self, one: _Candidate, path: str, holes: dict[str, str], below: bool) -> Place:
        if below:
            holes[_REST] = path[len(_fill(one.head, holes)) + 1 :]
        row = one.row
        parts = tuple([_fill(part, holes) for part in row.parts])
        return Place(self._table.id, _fill(row.outside, holes), parts, row.op, row.parameters)

    def _last(self, head: str) -> int:
        """The model's highest index where ``head`` says ``{last}``."""
        before = re.escape(head[: head.index(_LAST)])
        start = re.compile(re.sub(r"\\\{[a-z]\\\}", r"\\d+", before) + r"(\d+)")
        hits = (start.match(path) for path in self._paths)
        return max((int(hit[1]) for hit in hits if hit), default=-1)


def _listed(book: _Book, path: str, shape: str) -> list[_Candidate]:
    """The rows that name ``path`` and those that name its shape, in the order of the table."""
    named = book.get(path, [])
    shaped = book.get(shape, []) if shape != path else []
    return sorted(named + shaped) if named and shaped else named or shaped


def _fill(template: str, holes: Mapping[str, str]) -> str:
    if "{" in template:
        for hole, text in holes.items():
            template = template.replace(hole, text)
    return template
