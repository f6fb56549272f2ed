"""Everything that is printed goes through here: data to stdout, talk and progress to stderr.

Text that came from files may hold control or bidirectional characters that rewrite a terminal. ``clean`` escapes them; every
function here applies it. JSON stays valid: the same characters are written as ``\\uXXXX``.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Protocol

import click

from hubtool.cli.amounts import human_size
from hubtool.cli.context import state

# C0, DEL, C1, soft hyphen, Arabic letter mark, zero-width and bidi marks, line separators, surrogates, BOM, interlinear, tags
_UNSAFE_RANGES = (
    r"\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069"
    r"\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
)
_UNSAFE = re.compile(f"[{_UNSAFE_RANGES}]")
_JSON_UNSAFE = re.compile(f"[{_UNSAFE_RANGES.removeprefix(chr(92) + 'x00-' + chr(92) + 'x1f')}]")
_CHUNK = 500  # rows per write: one flush for many rows, yet the first rows of a long listing come at once
_MAX_CELL = 60  # characters of a table's cell; the other formats are never shortened


def clean(text: object) -> str:
    """``text`` with every character that could steer a terminal escaped as ``\\xNN`` or ``\\uNNNN``."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), str(text))


def say(text: str) -> None:
    """Tell the user something on stderr; silent with -q. Lines are kept, other control characters are escaped."""
    if not state().quiet:
        complain(text)


def complain(text: str, heading: str = "") -> None:
    """Like ``say``, but not silenced: warnings and errors. ``heading``: error, warning or hint."""
    body = "\n".join(clean(line) for line in text.split("\n"))
    click.echo(f"{_paint(heading)}: {body}" if heading else body, err=True)


def _paint(heading: str) -> str:
    plain = (
        "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    )  # click drops colours by itself where stderr is no TTY
    return heading if plain else click.style(heading, fg=_COLOURS.get(heading), bold=True)


_COLOURS = {"error": "red", "warning": "yellow", "hint": "cyan"}


def show(text: str = "") -> None:
    """Print lines of text to stdout, as data for people."""
    click.echo("\n".join(clean(line) for line in text.split("\n")))


def details(lines: Iterable[str], warning: str | None = None) -> None:
    """Lines that belong to the one before, indented; then what went wrong beside it."""
    for line in lines:
        show(f"  {line}")
    if warning:
        complain(warning, "warning")


def raw(text: str) -> None:
    """Print text of our own making (a script, a help page) as it is."""
    click.echo(text, nl=False)


def print_json(doc: Any) -> None:
    """Print one indented JSON document."""
    click.echo(to_json(doc, indent=2))


def to_json(doc: Any, indent: int | None = None) -> str:
    """``doc`` as JSON text: NaN and infinity become null, unsafe characters ``\\uXXXX``, times RFC 3339 UTC."""
    try:
        text = json.dumps(doc, ensure_ascii=False, allow_nan=False, indent=indent, default=_plain)
    except ValueError:  # a NaN or an infinity somewhere: rare, and worth a second pass
        text = json.dumps(_finite(doc), ensure_ascii=False, allow_nan=False, indent=indent, default=_plain)
    return _JSON_UNSAFE.sub(lambda match: json.dumps(match[0])[1:-1], text)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, bytes):
        return value.hex()
    return value.to_json()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


Row = Mapping[str, Any]


def listing(rows: Iterable[Row], columns: Sequence[str], fmt: str) -> None:
    """Print ``rows`` as ``fmt``. ``columns`` order the table and the csv; json and ndjson carry each row whole; paths need ``path``."""
    _WRITERS[fmt](rows, columns)


def _write_json(rows: Iterable[Row], columns: Sequence[str]) -> None:
    """One document, a row a line: indenting ten thousand rows takes longer than reading them."""
    lines = [to_json(row) for row in rows]
    _stream(["[" + ",\n ".join(lines) + "]"])


def _write_ndjson(rows: Iterable[Row], columns: Sequence[str]) -> None:
    _stream(to_json(row) for row in rows)


def _write_paths(rows: Iterable[Row], columns: Sequence[str]) -> None:
    escape = clean if sys.stdout.isatty() else str  # a pipe gets the true name, a terminal a harmless one
    for chunk in _chunks(escape(row["path"]) for row in rows):
        click.echo(os.fsencode("\n".join(chunk) + "\n"), nl=False)


def _write_csv(rows: Iterable[Row], columns: Sequence[str]) -> None:
    def lines() -> Iterator[str]:
        yield _csv_line(columns)
        for row in rows:
            yield _csv_line([_csv_cell(row.get(name)) for name in columns])

    _stream(lines())


def _csv_line(values: Sequence[Any]) -> str:
    import csv

    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(values)
    return buffer.getvalue()


def _csv_cell(value: Any) -> str:
    text = clean(_cell("", value))
    # A spreadsheet runs a text cell that begins like a formula; the apostrophe makes it text again.
    return "'" + text if isinstance(value, str) and text[:1] in ("=", "+", "-", "@") else text


def _write_table(rows: Iterable[Row], columns: Sequence[str]) -> None:
    cells = [[_shorten(clean(_cell(name, row.get(name)))) for name in columns] for row in rows]
    if cells:
        show(table(cells, columns))


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Aligned columns of text, two spaces apart; numbers to the right."""
    lines = [list(header), *rows] if header else list(rows)
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    right = [all(_NUMERIC.match(row[at]) for row in rows) for at in range(len(widths))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


_NUMERIC = re.compile(r"[\d.,]*( [kMGT]?B)?$")


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column in ("size", "bytes") and isinstance(value, int):
        return human_size(value)
    if isinstance(value, Mapping):
        return " ".join(f"{key}:{item}" for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(str(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shorten(text: str) -> str:
    # The end of a path says more than its middle: keep both ends.
    return text if len(text) <= _MAX_CELL else f"{text[:20]}...{text[-(_MAX_CELL - 23) :]}"


def _stream(lines: Iterable[str]) -> None:
    for chunk in _chunks(lines):
        click.echo("\n".join(chunk))


def _chunks(items: Iterable[str]) -> Iterator[list[str]]:
    source = iter(items)
    while chunk := list(islice(source, _CHUNK)):
        yield chunk


_WRITERS: Mapping[str, Callable[[Iterable[Row], Sequence[str]], None]] = {
    "table": _write_table,
    "json": _write_json,
    "ndjson": _write_ndjson,
    "csv": _write_csv,
    "paths": _write_paths,
}


class Advance(Protocol):
    """Tell a progress bar that ``n`` more items are done."""

    def __call__(self, n: int = 1) -> None: ...


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Advance]:
    """A progress bar on stderr while the block runs, with rate and time left; yields ``advance(n=1)``.

    Without a ``total`` the one who writes may announce it (``hubtool.tensors.progress``). Nothing is drawn with -q or when stderr is not a TTY.
    """
    if state().quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield _no_advance
        return
    from rich.console import Console

    from hubtool.cli.bars import drawn

    with drawn(clean(description), total, Console(stderr=True)) as bar:
        yield bar


def _no_advance(n: int = 1) -> None:
    """Count nothing: nobody is looking."""
