"""The query language: ``kind:lora family:sdxl rank:8..32 -kind:vae anime "two words" (tag:x | tag:y) sort:-size limit:20``.

    query := or; or := and (("OR" | "|") and)*; and := not+; not := ("-" | "^" | "NOT ") not | term
    term  := "(" or ")" | field ":" ["~" | "="] value | word | "quoted phrase" | is:FLAG | has:FIELD | no:FIELD

A parsed query can select rows in SQL (``clause``) and judge one subject in Python (``match``); a property test holds them equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hubtool.errors import UsageProblem
from hubtool.registry import fields as table
from hubtool.registry.conditions import Anything, Bind, Condition, Contains, OneOf, Value
from hubtool.registry.text import fold

Subject = Mapping[str, Sequence[Value]]  # field name -> its values, folded as the library folds them; none for NULL

_MAX_TERMS = 200  # SQLite refuses expressions deeper than 1000
_MAX_DEPTH = 40
_TOKEN = re.compile(
    r"""\s*(?: (?P<open>\() | (?P<close>\)) | (?P<or>\| | OR(?=\s)) | (?P<not>[-^](?=\S) | NOT\s)
    | (?:(?P<field>[A-Za-z_]\w*):(?P<op>[~=]?))? (?:"(?P<phrase>[^"]*)" | (?P<word>[^\s()"|]+))?
    )""",
    re.VERBOSE,
)


class Node(Protocol):
    """A part of a query."""

    def clause(self, bind: Bind) -> str:
        """SQL that is true or false (never NULL) for the row ``a`` of table artifact."""

    def match(self, subject: Subject) -> bool:
        """The same judgement in Python."""


@dataclass(frozen=True, slots=True)
class All:
    """Every part holds; an empty one always does."""

    parts: tuple[Node, ...] = ()

    def clause(self, bind: Bind) -> str:
        return f"({' AND '.join(part.clause(bind) for part in self.parts)})" if self.parts else "1 = 1"

    def match(self, subject: Subject) -> bool:
        return all(part.match(subject) for part in self.parts)


@dataclass(frozen=True, slots=True)
class AnyOf:
    """At least one part holds."""

    parts: tuple[Node, ...]

    def clause(self, bind: Bind) -> str:
        return f"({' OR '.join(part.clause(bind) for part in self.parts)})"

    def match(self, subject: Subject) -> bool:
        return any(part.match(subject) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Not:
    part: Node

    def clause(self, bind: Bind) -> str:
        return f"NOT {self.part.clause(bind)}"

    def match(self, subject: Subject) -> bool:
        return not self.part.match(subject)


@dataclass(frozen=True, slots=True)
class Term:
    """Some value of ``field`` meets ``condition``."""

    field: table.Field
    condition: Condition

    def clause(self, bind: Bind) -> str:
        return self.field.clause(self.condition.sql(self.field.sql, bind))

    def match(self, subject: Subject) -> bool:
        return any(self.condition.holds(value) for value in subject.get(self.field.name, ()))


@dataclass(frozen=True, slots=True)
class Query:
    """A parsed query. ``sort``: (field, descending) pairs. ``every_state``: it speaks of states itself, so nothing is hidden."""

    root: Node = field(default_factory=All)
    sort: tuple[tuple[str, bool], ...] = ()
    limit: int | None = None
    every_state: bool = False

    def match(self, subject: Subject) -> bool:
        """Whether ``subject`` is what the query asks for."""
        return self.root.match(subject)

    def clause(self) -> tuple[str, dict[str, Value]]:
        """(SQL condition on ``artifact a``, its parameters)."""
        parameters: dict[str, Value] = {}

        def bind(value: Value) -> str:
            name = f"p{len(parameters)}"
            parameters[name] = value
            return f":{name}"

        return self.root.clause(bind), parameters

    def order(self) -> str:
        """The ORDER BY list: missing values last, ties by id, so that every run prints the same."""
        parts = [
            f"{_order_key(name)} IS NULL, {_order_key(name)} {'DESC' if descending else 'ASC'}"
            for name, descending in self.sort
        ]
        return ", ".join([*parts, "a.id"])


def _order_key(name: str) -> str:
    return table.FIELDS[name].order


def term(name: str, operator: str, value: str, now: float | None = None) -> Node:
    """One ``field:value``."""
    if name in {"is", "has", "no"}:
        return _flag(name, value.lower())
    found = table.field(name)
    return Term(found, table.condition(found, operator, value, now))


def _flag(name: str, value: str) -> Node:
    if name == "is":
        if value not in table.FLAGS:
            raise table.unknown(
                "flag", value, sorted(table.FLAGS), "is:missing, is:offline, is:corrupt, is:unhashed ..."
            )
        target, condition, negated = table.FLAGS[value]
        node: Node = Term(table.FIELDS[target], condition)
    else:
        value = table.ALIASES.get(value, value)
        if value not in table.HAS:
            raise table.unknown("field", value, sorted(table.HAS), "has:trigger, no:tag ...")
        node, negated = Term(table.FIELDS[value], Anything()), name == "no"
    return Not(node) if negated else node


def words(text: str) -> Node:
    """``text`` somewhere in title, path, trigger words, tags, notes or metadata."""
    condition = Contains(fold(text))
    return AnyOf(tuple(Term(table.FIELDS[name], condition) for name in table.TEXT))


def parse(text: str | Iterable[str] = "", *, now: float | None = None) -> Query:
    """Parse a query, or the arguments of a command line. Raises UsageProblem, with the nearest name for an unknown field."""
    joined = text if isinstance(text, str) else " ".join(text)
    return _Parser(joined, now).query()


def both(query: Query, *extra: Node) -> Query:
    """``query`` narrowed by ``extra`` terms (the options of ``ls``)."""
    return Query(All((query.root, *extra)), query.sort, query.limit, query.every_state) if extra else query


class _Parser:
    """Recursive descent over tokens. ``sort:`` and ``limit:`` are taken out wherever they stand."""

    def __init__(self, text: str, now: float | None) -> None:
        self.now = now
        self.sort: list[tuple[str, bool]] = []
        self.limit: int | None = None
        self.every_state = False
        self.tokens = list(_tokens(text))
        self.at = 0
        if len(self.tokens) > _MAX_TERMS:
            raise UsageProblem(f"the query has more than {_MAX_TERMS} parts")

    def query(self) -> Query:
        root = self._or(0)
        if self.at < len(self.tokens):
            raise UsageProblem("the query has a ')' without a '('")
        return Query(root, tuple(self.sort), self.limit, self.every_state)

    def _peek(self, kind: str) -> bool:
        return self.at < len(self.tokens) and self.tokens[self.at]["kind"] == kind

    def _take(self, kind: str) -> bool:
        found = self._peek(kind)
        self.at += found
        return found

    def _or(self, depth: int) -> Node:
        if depth > _MAX_DEPTH:
            raise UsageProblem(f"the query is nested more than {_MAX_DEPTH} deep")
        parts = [self._and(depth)]
        while self._take("or"):
            parts.append(self._and(depth))
        if (len(parts) > 1 or depth) and All() in parts:
            raise UsageProblem("the query has an empty '()' or a '|' with nothing on one side", hint="a | b, (a b) | c")
        return parts[0] if len(parts) == 1 else AnyOf(tuple(parts))

    def _and(self, depth: int) -> Node:
        parts = []
        while self.at < len(self.tokens) and not self._peek("or") and not self._peek("close"):
            if (part := self._not(depth)) is not None:
                parts.append(part)
        return parts[0] if len(parts) == 1 else All(tuple(parts))

    def _not(self, depth: int) -> Node | None:
        negated = False
        while self._take("not"):
            negated = not negated
        part = self._term(depth)
        return Not(part) if negated and part is not None else part

    def _term(self, depth: int) -> Node | None:
        if self._take("open"):
            inside = self._or(depth + 1)
            if not self._take("close"):
                raise UsageProblem("the query has a '(' without a ')'")
            return inside
        if not self._peek("term"):
            raise UsageProblem(
                "the query ends, or joins, where a term should stand", hint="-kind:vae, NOT kind:vae, a | b"
            )
        token = self.tokens[self.at]
        self.at += 1
        return self._field(token["field"], token["op"], token["value"]) if token["field"] else words(token["value"])

    def _field(self, name: str, operator: str, value: str) -> Node | None:
        key = name.lower()
        if key == "sort":
            self.sort.extend(_sort_key(part) for part in value.split(",") if part)
            return None
        if key == "limit":
            self.limit = _limit(value)
            return None
        self.every_state |= key == "state" or (
            key == "is" and value.lower() in {"present", "offline", "missing", "trashed"}
        )
        return term(key, operator, value, self.now)


def _tokens(text: str) -> Iterable[dict[str, Any]]:
    at, end = 0, len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None or match.end() == at or not match[0].strip():
            raise UsageProblem(
                f"the query cannot be read from here: {text[at:end][:40]}", hint='quote a phrase: "two words"'
            )
        at = match.end()
        yield _token(match)


def _token(match: re.Match[str]) -> dict[str, Any]:
    for kind in ("open", "close", "or", "not"):
        if match[kind]:
            return {"kind": kind}
    value = match["phrase"] if match["phrase"] is not None else match["word"] or ""
    return {"kind": "term", "field": match["field"], "op": match["op"] or "", "value": value}


def _sort_key(text: str) -> tuple[str, bool]:
    descending = text.startswith("-") or text.endswith("-")
    return table.field(text.strip("+-")).name, descending


def _limit(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 12:
        raise UsageProblem(f"limit: needs a whole number, not {text!r}")
    return int(text)


def exactly(name: str, value: str) -> Node:
    """The term that an option of ``ls`` stands for: ``--kind lora``."""
    found = table.FIELDS[name]
    return Term(found, OneOf((fold(value),)) if found.type == "word" else Contains(fold(value)))
