"""The right side of ``field:value``: numbers, sizes, times and their ranges, as conditions."""

from __future__ import annotations

import re
from calendar import monthrange
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from hubtool.errors import UsageProblem
from hubtool.registry.conditions import Between

Span = tuple[float, float]  # first and last value that a word names: 2025-06 names a whole month

_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kmgt]?)(i?)b?", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_AGO = re.compile(r"-(\d+)([hdwmy])", re.IGNORECASE)
_DATE = re.compile(r"(\d{4})(?:-(\d{2})(?:-(\d{2}))?)?")
_HOURS = {"h": 1, "d": 24, "w": 7 * 24, "m": 30 * 24, "y": 365 * 24}
_COMPARE = re.compile(r"(<=|>=|<|>|=)(.*)", re.DOTALL)
_MAX = 2.0**63  # the largest integer a column holds; anything above compares the same


def number(text: str) -> Span:
    """``8``, ``0.5``, ``-1``."""
    if not _NUMBER.fullmatch(text) or len(text) > 40:
        raise UsageProblem(f"not a number: {text}", hint="8, 0.5, 8..32, >8, <=32")
    value = max(-_MAX, min(_MAX, float(text)))
    return value, value


def size(text: str) -> Span:
    """Bytes: ``1024``, ``100M`` (powers of 1000), ``1.5GiB`` (powers of 1024)."""
    match = _SIZE.fullmatch(text)
    if not match or len(text) > 40:
        raise UsageProblem(f"not a size: {text}", hint="100M, 1.5GB, 900MiB, 10M..2G, >100M")
    digits, unit, binary = match.groups()
    base = 1024 if binary else 1000
    value = min(_MAX, round(float(digits) * base ** " kmgt".index(unit.lower() or " ")))
    return value, value


def moment(text: str, now: float) -> Span:
    """Seconds since 1970: ``2025``, ``2025-06``, ``2025-06-30`` name whole spans (UTC); ``-2w`` is two weeks before ``now``."""
    if match := _AGO.fullmatch(text):
        hours = min(int(match[1][:6]) * _HOURS[match[2].lower()], 24 * 365 * 1000)
        then = float(int(now) - hours * 3600)
        return then, then
    if match := _DATE.fullmatch(text):
        try:
            return _span(*(int(part) if part else None for part in match.groups()))
        except ValueError:
            pass
    raise UsageProblem(
        f"not a time: {text}", hint="2025, 2025-06, 2025-06-30, -2w (h d w m y), 2025-01..2025-06, -2w.."
    )


def _span(year: int | None, month: int | None, day: int | None) -> Span:
    first = datetime(year or 0, month or 1, day or 1, tzinfo=UTC)
    last_month = month or 12
    last_day = day or monthrange(first.year, last_month)[1]
    end = datetime(first.year, last_month, last_day, tzinfo=UTC) + timedelta(days=1, seconds=-1)
    return first.timestamp(), end.timestamp()


def interval(text: str, parse: Callable[[str], Span]) -> Between:
    """``8..32``, ``8..``, ``..32``, ``>8``, ``>=8``, ``<8``, ``<=8`` or a single value, each end read by ``parse``."""
    if match := _COMPARE.fullmatch(text):
        return _compared(match[1], parse(match[2]))
    low, dots, high = text.partition("..")
    if not dots:
        return Between(*parse(text))
    return Between(parse(low)[0] if low else None, parse(high)[1] if high else None)


def _compared(operator: str, span: Span) -> Between:
    first, last = span
    return {
        "<": Between(high=first, without_high=True),
        "<=": Between(high=last),
        ">": Between(low=last, without_low=True),
        ">=": Between(low=first),
        "=": Between(first, last),
    }[operator]
