"""Keys of named syntaxes: key -> (prefix, spelled module, role), and the choice of ONE syntax for a file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

from hubtool.layouts import tables
from hubtool.layouts.tables import Syntax

BUNDLE = "bundle_emb."
_LONGEST_SUFFIX = 5  # dots in "processor.to_q_lora.lora_A.default.weight" and its like


class Spelled(NamedTuple):
    """A key taken apart: ``stem`` is the module as spelled, with the tail that the suffix swallowed put back. an empty ``prefix`` told nothing about its component."""

    key: str
    components: tuple[str, ...]
    stem: str
    role: str
    prefix: str


class Reading(NamedTuple):
    """One syntax's view of a file: keys it explains, and keys it does not."""

    syntax: Syntax
    spelled: tuple[Spelled, ...]
    others: tuple[str, ...]


def split_suffix(key: str) -> tuple[str, str] | None:
    """(stem, suffix) by the longest suffix any syntax knows; None for a key that no adapter has."""
    suffix = _suffix(".".join(key.rsplit(".", _LONGEST_SUFFIX)[1:]))
    return (key[: -len(suffix) - 1], suffix) if suffix else None


@lru_cache(4096)  # the ends of keys are few
def _suffix(tail: str) -> str:
    """The longest end of ``tail``, after any dot or its beginning, that is a suffix; empty when none is."""
    known = tables.suffixes()
    words = tail.split(".")
    return next((text for at in range(len(words)) if (text := ".".join(words[at:])) in known), "")


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """How one syntax reads keys with a suffix and a prefix."""

    syntax: str
    components: tuple[str, ...]
    role: str
    tail: str
    prefix: str


@cache
def _known_prefixes() -> re.Pattern[str]:
    """The longest prefix of any syntax; a shorter one that fits too is the beginning of it."""
    texts = {text for one in tables.syntaxes().values() for spellings in one.prefixes.values() for text in spellings}
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))


@cache
def _users(syntax_id: str) -> Mapping[str, tuple[str, ...]]:
    """prefix -> components that use it, the longest prefix first."""
    users: dict[str, list[str]] = {}
    for component, spellings in tables.syntaxes()[syntax_id].prefixes.items():
        for text in spellings:
            users.setdefault(text, []).append(component)
    return {text: tuple(users[text]) for text in sorted(users, key=len, reverse=True)}


@cache
def _views(suffix: str, longest: str) -> tuple[_View, ...]:
    """Every syntax's view of keys with this suffix, whose longest known prefix is ``longest``."""
    found: dict[str, _View] = {}
    for syntax_id, who, role, tail in tables.suffixes()[suffix]:
        for prefix, components in _users(syntax_id).items() if syntax_id not in found else ():
            if longest.startswith(prefix) and (who == "*" or who in components):
                owners = components if who == "*" else (who,)
                found[syntax_id] = _View(syntax_id, owners, role, tail, prefix)
                break
    return tuple(found.values())


_Cut = tuple[str, str, tuple[_View, ...]]  # key, its text before the suffix, every syntax's view


def _cut(key: str) -> _Cut:
    cut = split_suffix(key)
    if cut is None:
        return key, key, ()
    stem, suffix = cut
    found = _known_prefixes().match(stem)
    return key, stem, _views(suffix, found[0] if found else "")


def _spelled(key: str, stem: str, view: _View) -> Spelled:
    text = stem[len(view.prefix) :]
    return Spelled(key, view.components, f"{text}.{view.tail}" if view.tail else text, view.role, view.prefix)


def read(keys: Iterable[str]) -> Reading | None:
    """The file as the syntax reads it that explains most keys (ties: table order); None when none explains any.

    A syntax without prefixes explains any key with its suffixes: it comes after one that explains half of them by their prefix.
    """
    cuts = [_cut(key) for key in keys if not key.startswith(BUNDLE)]
    found = (_reading(name, cuts) for name in _ranked(cuts))
    return next((reading for reading in found if reading.spelled), None)


def _ranked(cuts: Iterable[_Cut]) -> list[str]:
    """Syntaxes by how much they explain, the best first."""
    count: Counter[str] = Counter()
    prefixed: Counter[str] = Counter()
    roles: dict[str, set[str]] = {}
    times = Counter(views for _, _, views in cuts if views)
    for views, many in times.items():
        for view in views:
            count[view.syntax] += many
            prefixed[view.syntax] += many if view.prefix else 0
            roles.setdefault(view.syntax, set()).add(view.role)
    half = times.total() / 2
    told = any(many >= half for many in prefixed.values())
    known = tables.syntaxes()
    order = list(known)
    fit = [name for name in count if not known[name].needs or known[name].needs & roles[name]]
    return sorted(fit, key=lambda name: (told and prefixed[name] < half, -count[name], order.index(name)))


def _reading(name: str, cuts: Iterable[_Cut]) -> Reading:
    syntax = tables.syntaxes()[name]
    spelled: list[Spelled] = []
    others: list[str] = []
    for key, stem, views in cuts:
        for view in views:
            if view.syntax == name:
                spelled.append(_spelled(key, stem, view))
                break
        else:
            others.append(key)
    alone = _unaccompanied(spelled, syntax) if syntax.companions else set()
    kept = tuple(one for one in spelled if one.key not in alone) if alone else tuple(spelled)
    return Reading(syntax, kept, (*others, *alone))


def _unaccompanied(spelled: Iterable[Spelled], syntax: Syntax) -> set[str]:
    """Keys whose role counts only beside another role of the same module, where that one is absent."""
    wanted = [one for one in spelled if one.role in syntax.companions]
    known = {(one.prefix, one.stem, one.role) for one in spelled} if wanted else set()
    return {one.key for one in wanted if (one.prefix, one.stem, syntax.companions[one.role]) not in known}


def foreign(reading: Reading) -> Counter[str]:
    """Keys left over that another syntax would claim, counted by that syntax: a file of two syntaxes is read differently by every tool."""
    own = reading.syntax.id
    named = ([view.syntax for view in _cut(key)[2] if view.prefix and view.syntax != own] for key in reading.others)
    return Counter(names[0] for names in named if names)


def write(syntax: Syntax, prefixes: Mapping[str, str], component: str, spelled: str, role: str) -> str | None:
    """The key of a tensor; None when the syntax has no place for the role or the module. ``prefixes`` overrides by component."""
    default = syntax.prefixes.get(component, syntax.prefixes.get("*"))
    if default is None:
        return None
    prefix = prefixes.get(component, default[0])
    for owner, tail, text in syntax.ends:
        if owner == role and spelled.endswith("." + tail):
            return f"{prefix}{spelled[: -len(tail)]}{text}"
    texts = syntax.roles_of(component).get(role)
    if texts is None:
        return None
    if not syntax.tails:
        return f"{prefix}{spelled}.{texts[0]}"
    for tail, text in syntax.tails:
        if spelled.endswith("." + tail):
            return f"{prefix}{spelled[: -len(tail)]}{text}.{texts[0]}"
    return None
