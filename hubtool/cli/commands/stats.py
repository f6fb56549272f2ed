"""Count what the library holds: kinds, families, bytes, roots."""

from __future__ import annotations

from typing import Any

import click

from hubtool.cli.amounts import human_size
from hubtool.cli.context import State, json_option, pass_state
from hubtool.cli.output import print_json, show, table


@click.command()
@json_option
@pass_state
def command(state: State, as_json: bool) -> None:
    """Count what the library holds."""
    from hubtool.actions import catalogue
    from hubtool.actions.library import reading

    with reading(state.library) as reader:
        document = catalogue.stats(reader)
    if as_json:
        print_json(document)
        return
    show(
        f"{document['artifacts']} artifacts, {human_size(document['bytes'])}, {document['unhashed']} files not hashed yet"
    )
    for name in ("kind", "family", "algorithm", "format", "health"):
        _facet(name, document[name])
    show()
    show("  ".join(f"{state} {count}" for state, count in document["locations"].items()))
    for root in document["roots"]:
        show(f"{root['path']}  {root['files']} files  {root['state']}")


def _facet(name: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        show()
        cells = [(row["value"] or "-", str(row["artifacts"]), human_size(row["bytes"])) for row in rows]
        show(table(cells, (name, "artifacts", "bytes")))
