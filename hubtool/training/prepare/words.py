"""The caption that goes with a prepared picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hubtool.training import seeds
from hubtool.training.config import Data
from hubtool.training.data import captions
from hubtool.training.data.items import Item
from hubtool.training.prepare.options import Options


def words(item: Item, picture: Any, options: Options, captioner: Callable[[Any], str] | None) -> str:
    """By ``options.captions``: what lies beside the picture (else its name), a template, its name, or what the model says."""
    text = _source(item, picture, options, captioner)
    text = captions.filled(text, item.name, options.tokens or ("{token}",))  # without tokens, training fills it
    return f"{options.prefix}{text}" if options.prefix and not text.startswith(options.prefix) else text


def _source(item: Item, picture: Any, options: Options, captioner: Callable[[Any], str] | None) -> str:
    if options.captions == "model" and captioner is not None:
        return captioner(picture)
    if options.captions == "keep" and item.caption is not None:
        return item.caption
    if options.captions == "template":
        found = captions.templates(Data(template=options.template)) or captions.OBJECT
        return seeds.dice(options.seed, "template", item.path.name).choice(found)
    return item.name
