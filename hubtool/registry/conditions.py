"""Conditions on one value, each written twice and side by side: as portable SQL and as Python. A property test holds them equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from hubtool.registry.text import like

Value = str | int | float
Bind = Callable[[Value], str]  # stores a parameter and returns its placeholder, ":p0"


class Condition(Protocol):
    """A condition on a value that is not NULL."""

    def sql(self, expression: str, bind: Bind) -> str: ...

    def holds(self, value: Value) -> bool: ...


@dataclass(frozen=True, slots=True)
class Contains:
    """The text contains ``part``; both are folded."""

    part: str

    def sql(self, expression: str, bind: Bind) -> str:
        return f"{expression} LIKE {bind(f'%{like(self.part)}%')} ESCAPE '!'"

    def holds(self, value: Value) -> bool:
        return self.part in str(value)


@dataclass(frozen=True, slots=True)
class StartsWith:
    """An id or digest (lower-case letters and digits) begins with ``part``: a range, so that an index serves it."""

    part: str

    def sql(self, expression: str, bind: Bind) -> str:
        return f"({expression} >= {bind(self.part)} AND {expression} <= {bind(self.part + 'z' * 64)})"

    def holds(self, value: Value) -> bool:
        return str(value).startswith(self.part)


@dataclass(frozen=True, slots=True)
class OneOf:
    """The value equals one of ``values``."""

    values: tuple[Value, ...]

    def sql(self, expression: str, bind: Bind) -> str:
        return f"{expression} IN ({', '.join(bind(value) for value in self.values)})"

    def holds(self, value: Value) -> bool:
        return value in self.values


@dataclass(frozen=True, slots=True)
class Member:
    """The comma-separated text has one of ``values`` as an item."""

    values: tuple[str, ...]

    def sql(self, expression: str, bind: Bind) -> str:
        parts = (f"(',' || {expression} || ',') LIKE {bind(f'%,{like(value)},%')} ESCAPE '!'" for value in self.values)
        return f"({' OR '.join(parts)})"

    def holds(self, value: Value) -> bool:
        return any(f",{item}," in f",{value}," for item in self.values)


@dataclass(frozen=True, slots=True)
class Between:
    """``low <= value <= high``; either end may be open (None) or exclusive."""

    low: float | None = None
    high: float | None = None
    without_low: bool = False
    without_high: bool = False

    def sql(self, expression: str, bind: Bind) -> str:
        parts = []
        if self.low is not None:
            parts.append(f"{expression} {'>' if self.without_low else '>='} {bind(self.low)}")
        if self.high is not None:
            parts.append(f"{expression} {'<' if self.without_high else '<='} {bind(self.high)}")
        return f"({' AND '.join(parts)})" if parts else "1 = 1"

    def holds(self, value: Value) -> bool:
        number = float(value) if isinstance(value, str) else value
        above = self.low is None or (number > self.low if self.without_low else number >= self.low)
        below = self.high is None or (number < self.high if self.without_high else number <= self.high)
        return above and below


@dataclass(frozen=True, slots=True)
class Anything:
    """Any value at all: ``has:``."""

    def sql(self, expression: str, bind: Bind) -> str:
        return f"{expression} IS NOT NULL"

    def holds(self, value: Value) -> bool:
        return True
