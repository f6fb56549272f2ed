"""``tag`` and ``set``: what a person says about artifacts. Every change is journalled; ``undo`` takes it back."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from hubtool.actions.choosing import choose
from hubtool.errors import UsageProblem
from hubtool.registry import curation
from hubtool.registry.curation import Change, Edit, Said
from hubtool.registry.store import Store
from hubtool.registry.text import fold

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+=|-=|=|!)(.*)", re.DOTALL)
_YES, _NO = {"yes", "true", "1", "on"}, {"no", "false", "0", "off", ""}
_ALIASES = {"note": "notes", "tags": "tag", "favourite": "favorite", "fav": "favorite"}


@dataclass(frozen=True, slots=True)
class Assignment:
    """``field=value``, ``field+=value``, ``field-=value`` or ``field!``."""

    field: str
    operator: str
    value: str


def split(words: Sequence[str]) -> tuple[list[str], list[Assignment]]:
    """(query or REFs, assignments) of the arguments of ``set``. Raises UsageProblem."""
    matches = [(word, _ASSIGNMENT.fullmatch(word)) for word in words]
    chosen = [word for word, match in matches if not match or ":" in word.partition("=")[0]]
    assignments = [_assignment(*match.groups()) for word, match in matches if match and word not in chosen]
    if not assignments:
        raise UsageProblem("nothing to set", hint="title=..., notes+=..., rating=4, favorite=yes, tag+=style, rating!")
    return chosen, assignments


def split_tags(words: Sequence[str]) -> tuple[list[str], list[Assignment]]:
    """(query or REFs, tags to add and remove) of the arguments of ``tag``: ``+name`` and ``-name``. Raises UsageProblem."""
    tags = [word for word in words if word[:1] == "+" or (word[:1] == "-" and ":" not in word)]
    if not tags:
        raise UsageProblem("no tag was named", hint="hubtool tag QUERY +style -todo")
    assignments = [_assignment("tag", f"{word[0]}=", word[1:]) for word in tags]
    return [word for word in words if word not in tags], assignments


def _assignment(field: str, operator: str, value: str) -> Assignment:
    name = _ALIASES.get(field.lower(), field.lower())
    if name not in _EDITS:
        near = get_close_matches(name, _EDITS, n=1, cutoff=0.5)
        more = f", did you mean {near[0]!r}?" if near else ""
        raise UsageProblem(f"there is no field {field!r} to set{more}", hint=f"fields: {', '.join(_EDITS)}")
    made = Assignment(name, operator, value.strip())
    _EDITS[name](made)(Said())  # says now what is wrong with the value
    return made


def edit(
    store: Store, words: Sequence[str], assignments: Sequence[Assignment], command: str, *, dry_run: bool = False
) -> list[Change]:
    """Apply the assignments to the artifacts that ``words`` choose; what changed, or would change."""
    artifacts = [(row.key, row.id) for row in choose(store, words)]
    if dry_run:
        return curation.preview(store, artifacts, lambda _key: _all(assignments))
    return curation.change(store, artifacts, lambda _key: _all(assignments), command)


def _all(assignments: Sequence[Assignment]) -> Edit:
    def apply(said: Said) -> Said:
        for one in assignments:
            said = _EDITS[one.field](one)(said)
        return said

    return apply


def _text(one: Assignment) -> Edit:
    if one.operator == "-=":
        raise UsageProblem(f"{one.field} is a text: it can be set (=), added to (+=) or cleared (!)")

    def apply(said: Said) -> Said:
        before = getattr(said, one.field) if one.operator == "+=" else None
        text = "\n".join(part for part in (before, one.value) if part) or None
        return replace(said, title=text) if one.field == "title" else replace(said, notes=text)

    return apply


def _rating(one: Assignment) -> Edit:
    cleared = one.operator == "!" or not one.value
    if one.operator not in ("=", "!") or (not cleared and not re.fullmatch("[0-5]", one.value)):
        raise UsageProblem(
            f"a rating is a number from 0 to 5, not {one.value!r}", hint="rating=4, or rating! to clear it"
        )
    return lambda said: replace(said, rating=None if cleared else int(one.value))


def _favorite(one: Assignment) -> Edit:
    value = one.value.lower()
    if one.operator not in ("=", "!") or value not in _YES | _NO:
        raise UsageProblem(f"favorite is yes or no, not {one.value!r}")
    return lambda said: replace(said, favorite=value in _YES)


def _tag(one: Assignment) -> Edit:
    names = [name.strip() for name in one.value.split(",") if name.strip()]
    if not names and one.operator in ("+=", "-="):
        raise UsageProblem("a tag needs a name")

    def apply(said: Said) -> Said:
        kept = {fold(name): name for name in said.tags} if one.operator in ("+=", "-=") else {}
        for name in names if one.operator != "!" else ():
            if one.operator == "-=":
                kept.pop(fold(name), None)
            else:
                kept.setdefault(fold(name), name)
        return replace(said, tags=tuple(kept[key] for key in sorted(kept)))

    return apply


_EDITS: dict[str, Callable[[Assignment], Edit]] = {
    "title": _text, "notes": _text, "rating": _rating, "favorite": _favorite, "tag": _tag,
}  # fmt: skip
