"""Keys whose upper and lower case were mixed up: the spelling that the tables know, where there is exactly one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from hubtool.layouts import index, tables, vocabulary

_MOST_FAMILIES = 4  # of the likeliest; each costs a vocabulary


@dataclass(frozen=True, slots=True)
class _Folded:
    """A key taken apart without regard to case: prefix and suffix as the syntax spells them, the module as found."""

    key: str
    syntax: str
    prefix: str
    components: tuple[str, ...]
    stem: str
    suffix: str


def recased(keys: Iterable[str]) -> dict[str, str]:
    """Key -> its spelling with the right case, for keys that change; empty where the tables do not know exactly one spelling."""
    views = [view for key in keys for view in _views(key)]
    if not views:
        return {}
    chosen = Counter(view.syntax for view in views).most_common(1)[0][0]
    mine = [view for view in views if view.syntax == chosen]
    families = [name for name, _ in index.shortlist(view.stem.lower() for view in mine)[:_MOST_FAMILIES]]
    tries = [_in_family(name, mine) for name in families]
    best = max(tries, key=len, default={})
    return {key: fixed for key, fixed in best.items() if fixed != key}


def _in_family(name: str, views: list[_Folded]) -> dict[str, str]:
    joiner = tables.syntaxes()[views[0].syntax].joiner
    found = {}
    for view in views:
        stem = next(
            (hit for c in view.components for hit in [_spellings(name, c, joiner).get(view.stem.lower())] if hit), None
        )
        if stem is not None:
            found[view.key] = f"{view.prefix}{stem}.{view.suffix}"
    return found


@cache
def _spellings(name: str, component: str, joiner: str) -> Mapping[str, str]:
    """lower-case spelling -> spelling, those left out that differ from another in case alone."""
    every = {
        text
        for size in vocabulary.models(name, component)
        for text in vocabulary.spellings(name, component, joiner, size)
    }
    count = Counter(text.lower() for text in every)
    return {text.lower(): text for text in every if count[text.lower()] == 1}


def _views(key: str) -> Iterator[_Folded]:
    """Every way in which a syntax could have spelled the key, case apart; none for a key that is healthy in case."""
    cut = _cut(key.lower())
    if cut is None or key == key.lower() == cut[0]:
        return
    lower, suffix = cut
    for syntax_id, who, _, tail in tables.suffixes()[suffix]:
        syntax = tables.syntaxes()[syntax_id]
        if tail or syntax.single_component:
            continue
        for component, prefixes in syntax.prefixes.items():
            prefix = next((text for text in prefixes if text and lower.startswith(text.lower())), None)
            if prefix is not None and who in ("*", component):
                stem = key[len(prefix) : len(lower)]
                yield _Folded(key, syntax_id, prefix, (component,), stem, suffix)


def _cut(lower: str) -> tuple[str, str] | None:
    """(what stands before the suffix, the suffix as it is spelled), by the longest suffix."""
    known = _suffixes()
    at = lower.find(".")
    while at >= 0:
        if lower[at + 1 :] in known:
            return lower[:at], known[lower[at + 1 :]]
        at = lower.find(".", at + 1)
    return None


@cache
def _suffixes() -> Mapping[str, str]:
    count = Counter(text.lower() for text in tables.suffixes())
    return {text.lower(): text for text in tables.suffixes() if count[text.lower()] == 1}
