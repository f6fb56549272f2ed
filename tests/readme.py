"""The blocks of README.md that come from the code: ``python -m tests.readme`` writes them, ``test_readme.py`` compares them.

A block lies between ``<!-- hubtool:NAME -->`` and ``<!-- end -->``; NAME is a key of ``BLOCKS``.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from hubtool.cli.errors import EXIT_CODES
from hubtool.cli.main import cli

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
    rows = [(f"`{row['id']}`", row["title"], row.get("base_model", "")) for row in _tables("families", "family")]
    return table(("family", "what", "usual base"), rows)


def layouts() -> str:
    rows = [
        (", ".join(f"`{name}`" for name in row["short"] or [row["id"]]), row["title"], SCALES[row["alpha"]])
        for row in _tables("syntaxes", "syntax")
    ]
    return table(("layout", "what", "scales"), rows)


def _tables(folder: str, head: str) -> list[dict[str, Any]]:
    paths = sorted((CHECKOUT / "schemas" / folder).glob("*.toml"))
    return [tomllib.loads(path.read_text("utf-8"))[head] for path in paths]


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


BLOCKS: Mapping[str, Callable[[], str]] = {
    "help": help_page,
    "exit-codes": exit_codes,
    "families": families,
    "layouts": layouts,
}


def regenerate(text: str) -> str:
    """``text`` with every block replaced by what the code says now."""
    return BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}", text)


if __name__ == "__main__":
    README.write_text(regenerate(README.read_text("utf-8")), "utf-8")
