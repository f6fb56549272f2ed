"""Options of the commands that choose ranks (extract, resize, distill): one place for their names, types and words.

@click.command()
@rank_options(within="at most")
@running_options
def command(**asked): Budget = budget(asked)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from hubtool.ops.extract.request import DTYPES, KINDS, Request, parse_size
from hubtool.ops.factor_space.budget import Budget

_Function = Callable[..., Any]
_LIMITS = ("rank", "energy", "error", "across", "max_rank")
_EXTRACTION = ("kind", "conv_rank", "dense", "modules", "layout", "dtype", "family", "seed", "device", "workers")


def stacked(options: Iterable[_Function]) -> _Function:
    """One decorator of several: options appear in the order in which they are named."""
    found = list(options)

    def decorate(function: _Function) -> _Function:
        for option in reversed(found):
            function = option(function)
        return function

    return decorate


output_option = click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path), help="Output file (or folder, for layout peft)."
)


def rank_options(*, most: str = "", conv: bool = True) -> _Function:
    """``--rank`` and its kin, ``--budget``, ``--max-rank``. ``most``: its default, in words; ``conv``: convolutions may have ranks of their own."""
    conv_rank = click.option("--conv-rank", type=click.IntRange(1), help="Another rank for convolutions above 1x1.")
    return stacked([
        click.option("--rank", type=click.IntRange(1), help="At most so many ranks in every module."),
        *([conv_rank] if conv else []),
        click.option("--energy", type=float, help="As few ranks as keep this share of ||dW||^2."),
        click.option("--error", type=float, help="As few ranks as bring ||dW - out|| / ||dW|| down to this."),
        click.option(
            "--across", is_flag=True,
            help="Reach --rank (as an average), --energy or --error over the whole file, not in every module.",
        ),
        click.option(
            "--budget", metavar="SIZE", help="The best that fits into SIZE (80MB, 1.5GiB), ranks shared out over the whole file."
        ),
        click.option("--max-rank", type=click.IntRange(1), help=f"No module gets more.{most and f'  [default: {most}]'}"),
    ])  # fmt: skip


extraction_options = stacked([
    rank_options(most="128, with --energy, --error, --budget"),
    click.option(
        "--as", "kind", type=click.Choice(KINDS), default="locon", show_default=True,
        help="lora: matrices and 1x1 convolutions; locon: all convolutions too; full: differences as they are.",
    ),
    click.option("--dense", is_flag=True, help="Norms and biases too, as full differences."),
    click.option("--modules", multiple=True, metavar="GLOB", help="Only these: unet.* , *.attn2.*  (repeatable)"),
    click.option("--layout", default="kohya", show_default=True, help="Key layout (kohya, diffusers, comfy, peft ...)."),
    click.option("--dtype", type=click.Choice(sorted(DTYPES)), default="fp16", show_default=True, help="Of the output."),
    click.option("--family", help="Family of both, where the files cannot tell."),
    click.option(
        "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random directions a decomposition starts from."
    ),
])  # fmt: skip


running_options = stacked(
    [
        click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu or cuda."),
        click.option("--workers", type=click.IntRange(1), help="Modules at a time; default: one for each processor."),
        click.option("--allow-loss", is_flag=True, help="Write even what the output cannot hold in full."),
    ]
)


def budget(asked: Mapping[str, Any]) -> Budget:
    """The ranks that the options of ``rank_options`` ask for. Raises ``UsageProblem``."""
    size = None if asked["budget"] is None else parse_size(asked["budget"])
    return Budget(size=size, **{name: asked[name] for name in _LIMITS})


def extraction(asked: Mapping[str, Any], container: str | None) -> Request:
    """What ``extraction_options`` and ``running_options`` ask for. Raises ``UsageProblem``."""
    return Request(budget=budget(asked), format=container, **{name: asked[name] for name in _EXTRACTION})
