"""Compare strengths, or adapters with one another, as one labelled picture."""

from __future__ import annotations

from typing import Any

import click

from hubtool.cli.commands.generate import command as generate
from hubtool.errors import UsageProblem

_OTHERS = ("grid", "picture", "search")  # options of `generate` that a comparison answers itself


@click.command(
    params=[one for one in generate.params if one.name not in _OTHERS],
    epilog="""\b
Examples:
  hubtool compare sdxl/ style.safetensors -p "a cat" --strengths 0,0.5,1 --seed 7 -o strengths.png
  hubtool compare sdxl/ epoch-1.safetensors epoch-2.safetensors epoch-3.safetensors -p "a cat" --seed 1-3 -o epochs.png
""",
)
@click.option("--strengths", metavar="A,B,...", help="A column for each; default: a column for each adapter.")
@click.pass_context
def command(context: click.Context, /, strengths: str | None, base: str | None, **asked: Any) -> None:
    """Make one picture of many: a row for each seed, a column for each of --strengths or for each ADAPTER on BASE.

    Everything else is as for `hubtool generate`; the recipe lies in the picture.
    """
    if base is None or not asked["adapters"]:
        raise UsageProblem("there is nothing to compare", hint="hubtool compare BASE ADAPTER... -p PROMPT -o OUT.png")
    grid = f"strengths={strengths}" if strengths else "adapters"
    context.invoke(generate, base=base, grid=grid, picture=None, search=(), **asked)
