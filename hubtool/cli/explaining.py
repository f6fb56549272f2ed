"""The pages of ``explain``: one list of sections, drawn plainly for pipes and with rich for terminals."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hubtool.cli.facts import family, joined, kind
from hubtool.cli.output import clean, show, table, to_json

Document = Mapping[str, Any]
_LONGEST = 100  # characters of a claim; metadata may hold whole documents
_MOST = 6  # of an axis' values; the rest is counted
_COLOURS = {
    "yes": "green", "partly": "yellow", "no": "red", "not known": "dim", "error": "red", "warning": "yellow", "info": "dim",
    "agrees": "green", "DIFFERS": "red",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Section:
    """A title and rows of cells; ``columns`` is the header, empty for none."""

    title: str
    rows: Sequence[tuple[str, ...]]
    columns: tuple[str, ...] = ()


def draw(doc: Document) -> None:
    """Print an explanation to stdout: coloured tables on a terminal, aligned text elsewhere."""
    sections = [section for section in _sections(doc) if section.rows]
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        _draw_rich(doc["path"], sections)
    else:
        show("\n".join(_plain(doc["path"], sections)))


def _plain(path: str, sections: Iterable[Section]) -> Iterator[str]:
    yield path
    for section in sections:
        yield from ("", section.title)
        cells = [tuple(clean(cell) for cell in row) for row in section.rows]
        yield from (f"  {line}".rstrip() for line in table(cells, section.columns).split("\n"))


def _draw_rich(path: str, sections: Iterable[Section]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(clean(path), style="bold"))
    for section in sections:
        console.print()
        console.print(Text(section.title, style="bold cyan"))
        grid = Table(
            box=None, show_header=bool(section.columns), header_style="dim", pad_edge=False, padding=(0, 2, 0, 2)
        )
        for at in range(len(section.rows[0])):
            grid.add_column(section.columns[at] if section.columns else "", overflow="fold")
        for row in section.rows:
            grid.add_row(*(Text(clean(cell), style=_COLOURS.get(cell, "")) for cell in row))
        console.print(grid)


def _sections(doc: Document) -> Iterator[Section]:
    yield Section("conclusions", list(_conclusions(doc)))
    yield Section("evidence", [(sentence,) for sentence in doc["evidence"] or ["none: nothing in the file is known"]])
    yield Section("axes", [row for axis in doc["axes"] for row in _axis(axis)], ("axis", "value", "count", "example"))
    yield Section("what decides the family", list(_family(doc["family_evidence"])))
    yield Section("claims against findings", list(map(_check, doc["claims_checked"])), ("", "claimed", "found", ""))
    claims = [(name, _short(value)) for name, value in doc["claims"].items()]
    yield Section("claims of the metadata (not verified)", claims or [("none", "")])
    yield Section("findings", list(_findings(doc["findings"])) or [("none",)])
    hosts = [row for verdict in doc["hosts"] for row in _host(verdict)]
    yield Section("who reads it", hosts, ("host", "version", "checked", "reads", "defect"))
    yield Section("next", [row for step in doc["next"] for row in ((step["command"],), (f"    {step['why']}",))])


def _conclusions(doc: Document) -> Iterator[tuple[str, str]]:
    components = joined(f"{name} {count}" for name, count in doc["components"].items())
    yield "container", doc["format"]
    yield "kind", kind(doc)
    yield "family", family(doc) or "not told by the file"
    yield "layout", doc["layout"] or "none"
    yield "components", components or "none"


def _axis(axis: Document) -> Iterator[tuple[str, ...]]:
    values = axis["values"]
    for at, value in enumerate(values[:_MOST]):
        yield "" if at else axis["axis"], value["value"], str(value["count"]), value["example"]
    if len(values) > _MOST:
        yield "", f"{len(values) - _MOST} more values", "", ""


def _family(evidence: Document | None) -> Iterator[tuple[str, ...]]:
    if evidence is None:
        return
    yield from ((f"not {name}", reason) for name, reason in evidence["against"].items())
    yield from (("would tell", sentence) for sentence in evidence["would_tell"])


def _check(check: Document) -> tuple[str, ...]:
    verdict = {True: "agrees", False: "DIFFERS", None: "cannot be compared"}[check["agrees"]]
    return check["what"], check["claimed"], check["found"], verdict


def _findings(items: Iterable[Mapping[str, str]]) -> Iterator[tuple[str, ...]]:
    for item in sorted(items, key=lambda item: ("error", "warning", "info").index(item["severity"])):
        yield item["severity"], f"{item['message']} [{item['code']}]"


def _host(verdict: Document) -> Iterator[tuple[str, ...]]:
    head = verdict["title"], verdict["version"], verdict["checked"], verdict["reads"]
    for at, defect in enumerate(f"{defect['text']} [{defect['source']}]" for defect in verdict["defects"]):
        yield (*(("", "", "", "") if at else head), defect)
    if not verdict["defects"]:
        yield (*head, "")


def _short(value: Any) -> str:
    line = " ".join((value if isinstance(value, str) else to_json(value)).split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
