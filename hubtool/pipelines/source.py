"""From a file to what a pipeline shall get."""

from __future__ import annotations

from pathlib import Path

from hubtool.adapters.ir import Adapter
from hubtool.errors import LoadMismatch, Unsupported, UsageProblem
from hubtool.formats import open_file
from hubtool.layouts.identify import identify
from hubtool.pipelines import kinds
from hubtool.pipelines.kinds import Ask, Content

_SHOWN = 3


def contents(source: Adapter | str | Path, ask: Ask) -> Content:
    """What is in ``source``. Raises ``Unsupported`` for a kind that no pipeline takes, ``UsageProblem`` for settings it does not have.

    Raises ``LoadMismatch`` when a tensor belongs to no module: loading the rest would look like success.
    """
    if isinstance(source, Adapter):
        if ask.settings:
            raise UsageProblem(f"an Adapter has no settings: {', '.join(ask.settings)}")
        content = Content(source, token=ask.token)
    else:
        file = open_file(Path(source))
        content = kinds.read(file, identify(file), ask)
    if content.adapter.extras:
        names = ", ".join(list(content.adapter.extras)[:_SHOWN])
        count = len(content.adapter.extras)
        raise LoadMismatch(f"{count} tensors belong to no module: {names}", hint="hubtool explain FILE")
    return content


def read(source: Adapter | str | Path, family: str | None) -> Adapter:
    """The adapter in ``source``. ``family`` settles a file that fits several. Raises ``Unsupported`` for what is none; as ``contents``."""
    content = contents(source, Ask(family))
    if content.effect is not None:
        hint = "hubtool.load it first, with a name, and give that name"
        raise Unsupported(f"a file of kind {content.kind} is no change of weights", hint=hint)
    return content.adapter
