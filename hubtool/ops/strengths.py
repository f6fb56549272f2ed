"""How strong each module of an input counts: one number, a number a component, by path, and the lists of block weights people pass around.

0.8                             all of it
unet=0.5,text_encoder=0         by component
unet:down_blocks.*=0.3          by path (a glob, or the start of a path), in one component or without ``unet:`` in all
IN04=0.5                        by block id (schemas/blocks.toml)
--blocks 1,0,0,...              a list of 12, 17, 19, 20, 25, 26 ... numbers, or the name of a preset: factors on top of the above
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from types import MappingProxyType
from typing import Any

from hubtool import resources
from hubtool.errors import TableError, UnknownFamily, UsageProblem

BASE = "BASE"
_BLOCK = re.compile(r"BASE|(?:IN|MID|OUT|D|S)\d*")
_SERIES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_NONE: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Strengths:
    """The strength of every module: its last matching pattern's, else its component's, else ``default``; times its block's factor.

    ``patterns``: (``component:path``, strength); ``block_list``: what ``--blocks`` said; ``factors``: what that means for modules,
    (``component:start of path``, factor), known after ``resolved``; ``rest``: the factor of modules outside every block.
    """

    default: float = 1.0
    components: Mapping[str, float] = field(default_factory=lambda: _NONE)
    patterns: tuple[tuple[str, float], ...] = ()
    block_list: str | None = None
    factors: tuple[tuple[str, float], ...] = ()
    rest: float = 1.0

    def of(self, component: str, path: str) -> float:
        """The strength of one module by its canonical path."""
        hits = [value for pattern, value in self.patterns if matches(pattern, component, path)]
        own = hits[-1] if hits else self.components.get(component, self.default)
        return own * self._factor(component, path)

    def _factor(self, component: str, path: str) -> float:
        found = (factor for pattern, factor in self.factors if matches(pattern, component, path))
        return next(found, self.rest)

    def resolved(self, family: str | None) -> Strengths:
        """Block ids and lists replaced by the paths they mean in ``family``. Raises ``UsageProblem``, ``UnknownFamily``."""
        if self.block_list is None and not any(_BLOCK.fullmatch(pattern) for pattern, _ in self.patterns):
            return self
        blocks = blocks_of(family)
        patterns = tuple(row for pattern, value in self.patterns for row in _unfolded(pattern, value, blocks))
        if self.block_list is None:
            return replace(self, patterns=patterns)
        numbers = blocks.numbers(self.block_list)
        factors = tuple((path, value) for block, value in numbers.items() for path in blocks.paths.get(block, ()))
        return replace(self, patterns=patterns, factors=factors, rest=numbers.get(BASE, 1.0), block_list=None)

    def unmatched(self, modules: Iterable[tuple[str, str]], family: str | None = None) -> list[str]:
        """Patterns, blocks and components that no module answers to: most likely misspelt."""
        known = list(modules)
        parts = {component for component, _ in known}
        lost = [name for name in self.components if name not in parts]
        for pattern, value in self.patterns:
            meant = Strengths(patterns=((pattern, value),)).resolved(family).patterns
            if not any(matches(one, *module) for one, _ in meant for module in known):
                lost.append(pattern)
        return lost

    @property
    def plain(self) -> bool:
        """Whether one number says everything."""
        return not (self.components or self.patterns or self.block_list or self.factors)

    def to_json(self) -> dict[str, Any]:
        rest = {**self.components, **dict(self.patterns)}
        return {"default": self.default, **({"parts": rest} if rest else {}), **self._blocks()}

    def _blocks(self) -> dict[str, Any]:
        return {} if self.block_list is None else {"blocks": self.block_list}


def matches(pattern: str, component: str, path: str) -> bool:
    """Whether ``component:path`` fits: a glob, a path, or the start of one that ends before a dot. Without a component, any fits."""
    owner, colon, inside = pattern.rpartition(":")
    if colon and owner not in ("*", component):
        return False
    return fnmatchcase(path, inside) or path == inside or path.startswith(f"{inside}.")


def parse(texts: Iterable[str] = (), blocks: str | None = None, strength: float | None = None) -> Strengths:
    """Strengths from the texts of ``--strength`` (each may hold several, separated by commas) and ``--blocks``. Raises ``UsageProblem``."""
    default = 1.0 if strength is None else strength
    components: dict[str, float] = {}
    patterns: list[tuple[str, float]] = []
    for part in (piece.strip() for text in texts for piece in text.split(",") if piece.strip()):
        name, equals, number = part.rpartition("=")
        value = _number(number, part)
        if not equals:
            default = value
        elif set(name) & set(":.*?[") or _BLOCK.fullmatch(name):
            patterns.append((name, value))
        else:
            components[name] = value
    return Strengths(default, MappingProxyType(components), tuple(patterns), blocks)


def _number(text: str, part: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        hint = "0.8, unet=0.5,text_encoder=0 or unet:down_blocks.*=0.3"
        raise UsageProblem(f"{part!r} is no strength", hint=f"write it as {hint}")
    return value


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of one family. ``paths``: id -> patterns; ``lists``: number of values -> ids in their order."""

    family: str
    paths: Mapping[str, tuple[str, ...]]
    lists: Mapping[int, tuple[str, ...]]

    def numbers(self, text: str) -> dict[str, float]:
        """Block id -> factor, for a list of numbers or the name of a preset. Blocks that a list leaves out count 0, as everywhere.

        Raises ``UsageProblem`` for a length no list has.
        """
        listed = presets().get(text.strip(), text)
        values = [_number(part.strip(), part) for part in listed.split(",")]
        order = self.lists.get(len(values))
        if order is None:
            raise UsageProblem(f"{len(values)} block weights for {self.family}", hint=self._lengths(len(values)))
        return {**dict.fromkeys(self.paths, 0.0), **dict(zip(order, values, strict=True))}

    def _lengths(self, given: int) -> str:
        """What lists there are, and whose list the given one would be."""
        own = f"its lists have {', '.join(map(str, sorted(self.lists)))} numbers"
        others = [family for family in block_families() if given in blocks_of(family).lists]
        return f"{own}; {given} are those of {', '.join(others)}" if others else own


def _unfolded(pattern: str, value: float, blocks: Blocks) -> Iterator[tuple[str, float]]:
    if not _BLOCK.fullmatch(pattern):
        yield pattern, value
        return
    if pattern not in blocks.paths:
        raise UsageProblem(f"{blocks.family} has no block {pattern}", hint=f"its blocks: {', '.join(blocks.paths)}")
    yield from ((path, value) for path in blocks.paths[pattern])


def block_families() -> tuple[str, ...]:
    """The families whose blocks have names."""
    return tuple(_file()["family"])


def presets() -> Mapping[str, str]:
    """Name -> list of block weights."""
    named: Mapping[str, str] = _file()["preset"]
    return named


def blocks_of(family: str | None) -> Blocks:
    """The blocks of a family. Raises ``UnknownFamily`` where they have no names."""
    tables = _file()["family"]
    if family is None or family not in tables:
        known = ", ".join(tables)
        raise UnknownFamily(
            f"the blocks of {family or 'an unknown family'} have no names", hint=f"only those of {known}"
        )
    body = tables[tables[family].get("like", family)]
    paths = {
        block: tuple(f"{body['component']}:{path}" for path in starts)
        for key, value in body["blocks"].items()
        for block, *starts in zip(*map(_series, (key, *value)), strict=True)
    }
    lists = {int(count): tuple(_listed(text)) for count, text in body["lists"].items()}
    _check(family, paths, lists)
    return Blocks(family, MappingProxyType(paths), MappingProxyType(lists))


def _check(family: str, paths: Mapping[str, Any], lists: Mapping[int, Sequence[str]]) -> None:
    for count, order in lists.items():
        if len(order) != count or not set(order) <= {BASE, *paths}:
            raise TableError(f"blocks.toml: the list of {count} of {family} names {len(order)} blocks, or unknown ones")


def _listed(text: str) -> Iterator[str]:
    return (name for word in text.split() for name in _series(word))


def _series(text: str) -> list[str]:
    """``D{00..18}`` -> D00 ... D18; in a path (lower-case) the numbers lose their zeros."""
    found = _SERIES.search(text)
    if found is None:
        return [text]
    width = len(found[1]) if text[:1].isupper() else 1
    return [
        f"{text[: found.start()]}{number:0{width}}{text[found.end() :]}"
        for number in range(int(found[1]), int(found[2]) + 1)
    ]


@cache
def _file() -> dict[str, Any]:
    path = resources.schemas() / "blocks.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise TableError(f"{path.name}: {error}", path=path) from error
