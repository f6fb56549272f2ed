"""Show the evidence for what a file is taken to be: every axis, every finding with its code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from hubtool.cli.context import State, json_option, pass_state
from hubtool.cli.facts import family, findings, joined, kind
from hubtool.cli.output import print_json, show, table, to_json

_AXES = (
    "path", "format", "kind", "kind_candidates", "variant", "algorithm", "flags", "family", "family_candidates", "base_model",
    "layout", "components", "evidence", "claims", "findings",
)  # fmt: skip


@click.command()
@click.argument("ref", metavar="FILE|REF")
@json_option
@pass_state
def command(state: State, ref: str, as_json: bool) -> None:
    """Show how hubtool came to its conclusions about FILE, or about REF of the library.

    What the metadata claims is listed beside what the tensors show; where they differ, the tensors win.
    """
    from hubtool.actions.inspect import inspect, locate

    document = inspect(locate(ref, state.library), hashes=False).to_json()
    if as_json:
        print_json({axis: document[axis] for axis in _AXES})
    else:
        show("\n".join(_lines(document)))


def _lines(doc: Mapping[str, Any]) -> Iterator[str]:
    yield doc["path"]
    components = joined(f"{name} {count}" for name, count in doc["components"].items())
    yield from _section("conclusions", [
        ("container", doc["format"]), ("kind", kind(doc)), ("family", family(doc) or "not told by the file"),
        ("layout", doc["layout"] or "none"), ("components", components or "none"),
    ])  # fmt: skip
    yield from [
        "",
        "evidence",
        *(f"  {sentence}" for sentence in doc["evidence"] or ["none: nothing in the file is known"]),
    ]
    claims = [(name, _value(value)) for name, value in doc["claims"].items()]
    yield from _section("claims of the metadata (not verified)", claims or [("none", "")])
    yield from ["", "findings", *(findings(doc["findings"]) or ["  none"])]


def _section(title: str, rows: list[tuple[str, str]]) -> Iterator[str]:
    yield from ["", title, *(f"  {line}" for line in table(rows).split("\n"))]


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else to_json(value)
    line = " ".join(text.split())
    return line if len(line) <= 100 else f"{line[:97]}..."
