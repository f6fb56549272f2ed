"""Keys of named syntaxes: key -> (prefix, spelled module, role), and the choice of ONE syntax for a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from hubtool.layouts import tables
from hubtool.layouts.tables import Syntax

BUNDLE = "bundle_emb."
_LONGEST_SUFFIX = 5  # dots in "processor.to_q_lora.lora_A.default.weight" and its like


@dataclass(frozen=True, slots=True)
class Spelled:
    """A key taken apart: ``stem`` is the module as spelled, with the tail that the suffix swallowed put back. an empty ``prefix`` told nothing about its component."""

    key: str
    components: tuple[str, ...]
    stem: str
    role: str
    prefix: str


@dataclass(frozen=True, slots=True)
class Reading:
    """One syntax's view of a file: keys it explains, and keys it does not."""

    syntax: Syntax
    spelled: tuple[Spelled, ...]
    others: tuple[str, ...]


def split_suffix(key: str) -> tuple[str, str] | None:
    """(stem, suffix) by the longest suffix any syntax knows; None for a key that no adapter has."""
    known = tables.suffixes()
    at = len(key)
    best: tuple[str, str] | None = None
    for _ in range(_LONGEST_SUFFIX):
        at = key.rfind(".", 0, at)
        if at < 0:
            break
        if key[at + 1 :] in known:
            best = key[:at], key[at + 1 :]
    return best


@cache
def _prefixes(syntax_id: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(prefix, components that use it), longest first."""
    users: dict[str, list[str]] = {}
    for component, spellings in tables.syntaxes()[syntax_id].prefixes.items():
        for text in spellings:
            users.setdefault(text, []).append(component)
    return tuple(sorted(((text, tuple(who)) for text, who in users.items()), key=lambda row: -len(row[0])))


def take_apart(key: str) -> dict[str, Spelled]:
    """Every syntax's view of ``key``, by syntax; empty when prefix or suffix are nobody's."""
    cut = split_suffix(key)
    if cut is None:
        return {}
    stem, suffix = cut
    views: dict[str, Spelled] = {}
    for syntax_id, who, role, tail in tables.suffixes()[suffix]:
        if syntax_id in views:
            continue
        for prefix, components in _prefixes(syntax_id):
            if stem.startswith(prefix) and (who == "*" or who in components):
                text = stem[len(prefix) :]
                owners = components if who == "*" else (who,)
                views[syntax_id] = Spelled(key, owners, f"{text}.{tail}" if tail else text, role, prefix)
                break
    return views


def read(keys: Iterable[str]) -> tuple[Reading, ...]:
    """Every syntax that explains at least one key, the one that explains most first (ties: table order).

    A syntax without prefixes explains any key with its suffixes: it comes after one that explains half of them by their prefix.
    """
    views = {key: take_apart(key) for key in keys if not key.startswith(BUNDLE)}
    count = Counter(syntax_id for view in views.values() for syntax_id in view)
    prefixed = Counter(name for view in views.values() for name, one in view.items() if one.prefix)
    half = sum(map(bool, views.values())) / 2
    told = any(times >= half for times in prefixed.values())
    order = list(tables.syntaxes())
    fit = [name for name in count if _has_what_it_needs(name, views)]
    ranked = sorted(fit, key=lambda name: (told and prefixed[name] < half, -count[name], order.index(name)))
    return tuple(_reading(name, views) for name in ranked)


def _has_what_it_needs(name: str, views: Mapping[str, Mapping[str, Spelled]]) -> bool:
    needs = tables.syntaxes()[name].needs
    return not needs or any(view[name].role in needs for view in views.values() if name in view)


def _reading(name: str, views: Mapping[str, Mapping[str, Spelled]]) -> Reading:
    spelled = tuple(view[name] for view in views.values() if name in view)
    others = tuple(key for key, view in views.items() if name not in view)
    return Reading(tables.syntaxes()[name], spelled, others)


def foreign(reading: Reading) -> Counter[str]:
    """Keys left over that another syntax would claim, counted by that syntax: a file of two syntaxes is read differently by every tool."""
    views = (take_apart(key) for key in reading.others)
    named = ([name for name, one in view.items() if one.prefix] for view in views)
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
