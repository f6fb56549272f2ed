"""The blocks of README.md that come from the code: ``python -m tests.readme`` writes them, ``test_readme.py`` compares them.

A block lies between ``<!-- hubtool:NAME -->`` and ``<!-- end -->``; NAME is a key of ``BLOCKS``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import click

from hubtool.cli.errors import EXIT_CODES
from hubtool.cli.main import cli
from hubtool.layouts import tables
from tests import matrix

CHECKOUT = Path(__file__).resolve().parent.parent
README = CHECKOUT / "README.md"
BLOCK = re.compile(r"(<!-- hubtool:([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_WIDTH = 100
SCALES = {
    "tensor": "an alpha tensor per module",
    "metadata": "in the file's metadata",
    "config": "in `adapter_config.json`",
    "none": "none: 1",
}


def help_page() -> str:
    settings = {**cli.context_settings, "terminal_width": _WIDTH, "max_content_width": _WIDTH}
    context = click.Context(cli, info_name="hubtool", **settings)
    return f"```\n{cli.get_help(context)}\n```"


def exit_codes() -> str:
    return table(("code", "meaning"), [(str(code), meaning) for code, meaning in EXIT_CODES.items()])


def families() -> str:
    rows = [_family(tables.family(name)) for name in tables.family_ids()]
    return table(("family", "what", "usual base", "namings", "sizes"), rows)


def _family(row: tables.Family) -> tuple[str, ...]:
    sizes = len(next(iter(row.components.values())))
    namings = ", ".join(f"`{name}`" for name in ("diffusers", *row.namings))
    return f"`{row.id}`", row.title, row.base_model, namings, str(sizes)


def layouts() -> str:
    rows = [
        (f"`{_short(one)}`", one.title, SCALES[one.alpha], _count(matrix.families_of(one.id)))
        for one in sorted(tables.syntaxes().values(), key=_short)
    ]
    return table(("layout", "what", "scales", "families"), rows)


def _short(syntax: tables.Syntax) -> str:
    return next(iter(syntax.short), syntax.id)


def _count(names: frozenset[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)) if len(names) < 4 else str(len(names))


def algorithms() -> str:
    columns = sorted(matrix.syntaxes(), key=_short)
    rows = [(name, *(matrix.algorithm(name, one) for one in columns)) for name in matrix.ALGORITHMS]
    return table(("algorithm", *(f"`{_short(one)}`" for one in columns)), rows)


def families_by_layout() -> str:
    columns = sorted(tables.syntaxes().values(), key=_short)
    rows = [
        (f"`{name}`", *(matrix.EXACT if name in matrix.families_of(one.id) else matrix.NONE for one in columns))
        for name in tables.family_ids()
    ]
    return table(("family", *(f"`{_short(one)}`" for one in columns)), rows)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


BLOCKS: Mapping[str, Callable[[], str]] = {
    "help": help_page,
    "exit-codes": exit_codes,
    "families": families,
    "layouts": layouts,
    "algorithms": algorithms,
    "families-by-layout": families_by_layout,
}


def regenerate(text: str) -> str:
    """``text`` with every block replaced by what the code says now."""
    return BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}", text)


if __name__ == "__main__":
    README.write_text(regenerate(README.read_text("utf-8")), "utf-8")
