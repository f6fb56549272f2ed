"""Keys broken by hand: which of the known repairs (``schemas/repairs.toml``) would make a file readable, key by key. Never applied unasked.

A repair is offered only when it is injective and more keys mean something after it than before (spec/layouts.md 4.2, 26).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hubtool import resources
from hubtool.errors import CorruptFile
from hubtool.formats.base import TensorFile
from hubtool.layouts.outline import RAW, Outline, outline
from hubtool.layouts.repair_case import recased
from hubtool.layouts.unwrap import unwrap
from hubtool.tensors.ref import TensorRef

CASE = "letter-case"
_MOST_PASSES = 4  # damage done twice is undone in two passes; a cycle ends here


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of damage and what undoes it."""

    id: str
    title: str
    match: re.Pattern[str]
    replace: str


@dataclass(frozen=True, slots=True)
class Repair:
    """``renames``: broken key -> what it should read, only keys that change. ``rules``: those that fired, as (id, title).

    ``resolved`` of ``total`` keys then name a module that a family's vocabulary knows; ``candidates``: the families that fit.
    """

    renames: Mapping[str, str]
    rules: tuple[tuple[str, str], ...]
    resolved: int
    total: int
    candidates: tuple[str, ...]

    def sentence(self) -> str:
        """What is broken and what it should read, for people."""
        first, fixed = next(iter(self.renames.items()))
        count = len(self.renames)
        what = "; ".join(title for _, title in self.rules)
        known = f"; {self.resolved} of {self.total} keys then name modules of {' or '.join(self.candidates)}"
        keys = "1 key was" if count == 1 else f"{count} keys were"
        return f"{keys} broken by hand ({what}): {first} should read {fixed}{known if self.candidates else ''}"

    def to_json(self) -> dict[str, Any]:
        return {
            "rules": [{"id": name, "title": title} for name, title in self.rules],
            "renames": dict(self.renames),
            "resolved": self.resolved,
            "total": self.total,
            "family_candidates": list(self.candidates),
        }


@cache
def rules() -> tuple[Rule, ...]:
    """The repairs of ``schemas/repairs.toml``, in the order in which they are tried."""
    doc = resources.table("repairs.toml")
    return tuple(Rule(row["id"], row["title"], re.compile(row["match"]), row["replace"]) for row in doc["repair"])


def propose(tensors: Mapping[str, TensorRef], path: Path | None = None) -> Repair | None:
    """The repair of a set of keys; None when nothing is broken in a way we know, or when it would not make more of them readable."""
    where = path or Path("keys")
    by_rule = _by_rules(tensors)
    found = None if by_rule is None else _worth(tensors, *by_rule, where)
    if found is not None:
        return found
    cased = recased(tensors)
    return _worth(tensors, cased, ((CASE, "upper and lower case are mixed up"),), where) if cased else None


def _by_rules(keys: Iterable[str]) -> tuple[dict[str, str], tuple[tuple[str, str], ...]] | None:
    renames: dict[str, str] = {}
    fired: dict[tuple[str, str], None] = {}
    for key in keys:
        fixed, used = mend(key)
        if fixed != key:
            renames[key] = fixed
            fired |= dict.fromkeys((rule.id, rule.title) for rule in used)
    return (renames, tuple(fired)) if renames else None


def mend(key: str) -> tuple[str, list[Rule]]:
    """One key as the rules would have it, and the rules that changed it."""
    used: list[Rule] = []
    for _ in range(_MOST_PASSES):
        before = key
        for rule in rules():
            fixed = rule.match.sub(rule.replace, key, count=1)
            if fixed != key:
                used.append(rule)
                key = fixed
        if key == before:
            break
    return key, used


def _worth(
    tensors: Mapping[str, TensorRef], renames: Mapping[str, str], used: tuple[tuple[str, str], ...], path: Path
) -> Repair | None:
    mended = renamed(tensors, renames)
    if mended is None:
        return None
    before, after = _outlined(tensors, path), _outlined(mended, path)
    if after is None or (before is not None and _score(after) <= _score(before)):
        return None
    return Repair(MappingProxyType(dict(renames)), used, _score(after)[0], len(tensors), after.candidates)


def renamed(tensors: Mapping[str, TensorRef], renames: Mapping[str, str]) -> dict[str, TensorRef] | None:
    """The tensors under their new names, in the same order; None when two would have one name."""
    names = {key: renames.get(key, key) for key in tensors}
    if len(set(names.values())) < len(names):
        return None
    return {name: replace(tensors[key], name=name) for key, name in names.items()}


def _outlined(tensors: Mapping[str, TensorRef], path: Path) -> Outline | None:
    try:
        return outline(tensors, path)
    except CorruptFile:  # keys that contradict each other: nothing can be read from them
        return None


def _score(found: Outline) -> tuple[int, int]:
    """(keys of modules that a vocabulary knows, keys of any module)."""
    spelled = len(found.keys())
    if found.layout.naming == RAW:
        return 0, spelled
    unnamed = set(found.unnamed)
    known = sum(len(draft.keys) for key, draft in found.modules.items() if ".".join(key) not in unnamed)
    return known, spelled


def apply(file: TensorFile, repair: Repair) -> TensorFile:
    """The file with its keys mended. Nothing is written; ``header_bytes`` stays that of the broken original, for the receipt."""
    view, _ = unwrap(file)
    mended = renamed(view.tensors, repair.renames)
    assert mended is not None, "a proposed repair is injective"
    return replace(view, tensors=MappingProxyType(mended))
