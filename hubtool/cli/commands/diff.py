"""Compare two adapters or two checkpoints: keys, shapes, changes, cosines, principal angles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from hubtool.actions.diff import diff
from hubtool.cli import output
from hubtool.cli.context import State, json_option, pass_state
from hubtool.ops.diff.report import Difference, Entry

_MOST = 5  # names of a list


@click.command(
    epilog="""\b
Exit code 0 when both hold the same numbers, 1 when they differ.
\b
Examples:
  hubtool diff style.safetensors style-diffusers.safetensors
  hubtool diff base.safetensors tuned-folder/ --top 20
  hubtool diff a.safetensors b.safetensors --json
"""
)
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option(
    "--top", type=click.IntRange(0), default=10, show_default=True, help="Modules to list, those that differ most."
)
@click.option("--family", help="Family of both, where the files cannot tell.")
@click.option("--workers", type=click.IntRange(1), help="Tensors at a time; default: one for each processor.")
@json_option
@pass_state
@click.pass_context
def command(
    context: click.Context,
    state: State,
    first: Path,
    second: Path,
    top: int,
    family: str | None,
    workers: int | None,
    as_json: bool,
) -> None:
    """Say how FIRST and SECOND differ: two adapters in any layouts, algorithms and ranks, two checkpoints in any containers, or two files.

    Adapters are compared by what they do to the base weights. Similarity is the cosine of all numbers as one vector.
    """
    with output.progress(f"comparing {first.name} and {second.name}") as advance:
        found = diff(first, second, family, workers=workers, progress=advance, library=state.library)
    if as_json:
        output.print_json(found.to_json())
    else:
        for line in _lines(found, top):
            output.show(line)
    if not found.equal:
        context.exit(1)


def _lines(found: Difference, top: int) -> Iterator[str]:
    things = {"adapters": "modules", "checkpoints": "parameters"}.get(found.kind, "tensors")
    different = sum(not entry.equal for entry in found.entries)
    family = f"{found.family}, " if found.family else ""
    if found.equal:
        yield f"equal: {family}{len(found.entries)} {things}"
        return
    total = found.total
    yield f"different: {family}{different} of {len(found.entries)} {things}"
    yield f"  similarity {_number(found.similarity)}, change {_number(total.relative)}, largest {_number(total.most)}"
    for title, names in _lists(found):
        yield f"  {title}: {len(names)} {things}, {', '.join(names[:_MOST])}" + (", ..." if len(names) > _MOST else "")
    rows = [_row(entry, found.kind) for entry in found.largest(top)]
    if rows:
        yield ""
        yield output.table(rows, _HEADERS[found.kind == "adapters"])


def _lists(found: Difference) -> Iterator[tuple[str, list[str]]]:
    shapes = [f"{one.name} {one.first} / {one.second}" for one in found.shapes]
    dtypes = [f"{one.name} {one.first} / {one.second}" for one in found.dtypes]
    unknown = [f"{name} ({reason})" for name, reason in (found.unknown or {}).items()]
    lists = (
        ("only in the first", list(found.only_first)),
        ("only in the second", list(found.only_second)),
        ("other shapes", shapes),
        ("other dtypes", dtypes),
        ("not comparable", unknown),
    )
    yield from ((title, names) for title, names in lists if names)


_HEADERS = {
    False: ("name", "change", "cosine", "max abs"),
    True: ("module", "change", "cosine", "max abs", "ranks", "angles out", "angles in"),
}


def _row(entry: Entry, kind: str) -> list[str]:
    moments = entry.moments
    row = [output.clean(entry.name), _number(moments.relative), _number(moments.cosine), _number(moments.most)]
    if kind != "adapters":
        return row
    ranks = "" if entry.ranks is None else "/".join("-" if rank is None else str(rank) for rank in entry.ranks)
    angles = ["" if one is None else f"{one.smallest:.0f}..{one.largest:.0f}" for one in (entry.outputs, entry.inputs)]
    return [*row, ranks, *angles]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
