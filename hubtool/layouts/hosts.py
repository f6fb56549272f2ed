"""Which programs read an adapter file, and with which defect: ``schemas/hosts.toml`` applied to one file.

A combination that no row covers is "not known", never a guess. Nothing is loaded and no host is run; torch is not needed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from hubtool import resources
from hubtool.errors import TableError
from hubtool.layouts.hosts_facts import FACTS, Subject, of_parsed
from hubtool.layouts.parse import Parsed

Reads = Literal["yes", "partly", "no", "not known"]
_WORST: tuple[Reads, ...] = ("no", "partly", "yes")
_CONDITIONS = frozenset({"host", "form", "family", "not_family", "within", "has", "facts", "without", "keys"})


@dataclass(frozen=True, slots=True)
class Host:
    """A program that loads adapters. ``how``: ``run`` (loaded and measured here with this version) or ``source`` (its code was read)."""

    id: str
    title: str
    version: str
    how: str


@dataclass(frozen=True, slots=True)
class Defect:
    """What goes wrong, in one sentence, and where that is from (``diffusers#13998``)."""

    text: str
    source: str

    def to_json(self) -> dict[str, str]:
        return {"text": self.text, "source": self.source}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one host reads a file. ``defects`` is empty for a plain yes and for what is not known."""

    host: Host
    reads: Reads
    defects: tuple[Defect, ...] = ()

    def to_json(self) -> dict[str, Any]:
        host = self.host
        return {
            "host": host.id,
            "title": host.title,
            "version": host.version,
            "checked": host.how,
            "reads": self.reads,
            "defects": [defect.to_json() for defect in self.defects],
        }


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of the table; an empty condition asks nothing."""

    hosts: frozenset[str]
    forms: frozenset[str]
    families: frozenset[str]
    not_families: frozenset[str]
    within: frozenset[str]
    has: frozenset[str]
    facts: frozenset[str]
    without: frozenset[str]
    keys: tuple[str, ...]
    reads: Reads
    defect: Defect | None

    def fits(self, host: str, form: str | None, family: str | None, subject: Subject) -> bool:
        return (
            host in self.hosts
            and (not self.forms or form in self.forms)
            and (not self.families or family in self.families)
            and family not in self.not_families
            and (not self.within or subject.algorithms <= self.within)
            and (not self.has or bool(subject.algorithms & self.has))
            and all(map(subject.is_, self.facts))
            and not any(map(subject.is_, self.without))
            and all(map(subject.has_key, self.keys))
        )


@dataclass(frozen=True, slots=True)
class Table:
    """The compiled table. ``forms``: (id, title, expression) in the order in which a key is tried; ``layouts``: what may be a remedy."""

    hosts: tuple[Host, ...]
    forms: tuple[tuple[str, str, re.Pattern[str]], ...]
    reads: tuple[_Row, ...]
    defects: tuple[_Row, ...]
    layouts: tuple[str, ...]


@cache
def table() -> Table:
    """``schemas/hosts.toml``, compiled and checked. Raises ``TableError`` for words that mean nothing."""
    doc = resources.table("hosts.toml")
    hosts = tuple(Host(row["id"], row["title"], row["version"], row["how"]) for row in doc["host"])
    forms = tuple((row["id"], row["title"], re.compile(row["key"])) for row in doc["form"])
    reads, defects = (tuple(_row(row, doc["groups"]) for row in doc[name]) for name in ("reads", "defect"))
    made = Table(hosts, forms, reads, defects, tuple(doc["remedies"]["layouts"]))
    _check(made)
    return made


def _row(row: Mapping[str, Any], groups: Mapping[str, list[str]]) -> _Row:
    odd = row.keys() - _CONDITIONS - {"reads", "defect", "source"}
    if odd or row["reads"] not in _WORST:
        raise TableError(f"hosts.toml: {sorted(odd) or row['reads']} means nothing in {row.get('defect', row)}")

    def words(name: str) -> frozenset[str]:
        given = row.get(name, ())
        return frozenset(word for text in given for word in (groups[text[1:]] if text.startswith("@") else [text]))

    defect = Defect(row["defect"], row["source"]) if "defect" in row else None
    return _Row(
        hosts=words("host"),
        forms=words("form"),
        families=words("family"),
        not_families=words("not_family"),
        within=words("within"),
        has=words("has"),
        facts=words("facts"),
        without=words("without"),
        keys=tuple(row.get("keys", ())),
        reads=row["reads"],
        defect=defect,
    )


def _check(made: Table) -> None:
    hosts, forms = {host.id for host in made.hosts}, {form for form, _, _ in made.forms}
    for row in (*made.reads, *made.defects):
        odd = (row.hosts - hosts) | (row.forms - forms) | ((row.facts | row.without) - FACTS.keys())
        if odd:
            raise TableError(f"hosts.toml: {', '.join(sorted(odd))} is no host, form or fact")
        if (row.defect is None) != (row.reads == "yes"):
            raise TableError(
                f"hosts.toml: a row for {', '.join(sorted(row.hosts))} needs a defect exactly when it is no yes"
            )


def form_of(keys: Iterable[str]) -> str | None:
    """What the keys look like to a host; None when no form fits most of them."""
    names = [_form(key) for key in keys]
    best, count = Counter(names).most_common(1)[0] if names else (None, 0)
    return best if 2 * count > len(names) else None


def _form(key: str) -> str | None:
    return next((form for form, _, expression in table().forms if expression.search(key)), None)


def verdicts(found: Parsed | Subject, *, single: bool = True) -> tuple[Verdict, ...]:
    """Every host's verdict on an adapter, in the table's order. ``single``: the file has no configuration beside it."""
    subject = of_parsed(found, single=single) if isinstance(found, Parsed) else found
    form = form_of(subject.keys)
    return tuple(_verdict(host, form, subject) for host in table().hosts)


def _verdict(host: Host, form: str | None, subject: Subject) -> Verdict:
    """One verdict over all families the file may be of: they must agree."""
    each = {family: _judge(host, form, family, subject) for family in subject.families or (None,)}
    kinds = {verdict.reads for verdict in each.values()}
    if len(kinds) > 1:
        told = ", ".join(f"{verdict.reads} for {family}" for family, verdict in each.items())
        return Verdict(host, "not known", (Defect(f"depends on the family: {told}", "hosts table"),))
    defects = dict.fromkeys(defect for verdict in each.values() for defect in verdict.defects)
    return Verdict(host, kinds.pop(), tuple(defects))


def _judge(host: Host, form: str | None, family: str | None, subject: Subject) -> Verdict:
    defects = [row for row in table().defects if row.fits(host.id, form, family, subject)]
    base = next((row for row in table().reads if row.fits(host.id, form, family, subject)), None)
    if base is None:
        defects = [row for row in defects if row.reads == "no"]
        if not defects:
            return Verdict(host, "not known")
    rows = [row for row in (base, *defects) if row is not None]
    worst = min((row.reads for row in rows), key=_WORST.index)
    return Verdict(host, worst, tuple(_told(rows)))


def _told(rows: Iterable[_Row]) -> Iterator[Defect]:
    for row in rows:
        if row.defect is not None:
            yield row.defect
