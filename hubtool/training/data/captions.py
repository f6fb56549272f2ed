"""Which words go with an image, this time."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from hubtool.errors import UsageProblem
from hubtool.training.config import Data
from hubtool.training.data.items import Item

# Gal et al. 2022 (arXiv 2208.01618), shortened: enough variety that the token does not learn the sentence
OBJECT = (
    "a photo of {token}", "a rendering of {token}", "a cropped photo of {token}", "a close-up photo of {token}",
    "a bright photo of {token}", "a dark photo of {token}", "a good photo of {token}", "a photo of one {token}",
)  # fmt: skip
STYLE = (
    "a painting in the style of {token}", "a rendering in the style of {token}", "a picture in the style of {token}",
    "a dark painting in the style of {token}", "a bright painting in the style of {token}", "a drawing in the style of {token}",
)  # fmt: skip
PRESETS = {"object": OBJECT, "style": STYLE}


def templates(data: Data) -> tuple[str, ...]:
    """The templates asked for; ``object`` and ``style`` are sets of their own."""
    return tuple(text for one in data.template for text in PRESETS.get(one, (one,)))


def caption(item: Item, data: Data, tokens: Sequence[str], dice: Random) -> str:
    """The caption of ``item``: its own words, the template's or the file's name, with the new tokens in their place.

    Without any other source, runs with new tokens use the templates of ``object``. ``dice`` decides between templates, about dropping and about the order of tags. Raises ``UsageProblem`` for an image that should
    have a caption file and has none.
    """
    choice, dropped = dice.random(), dice.random() < data.caption_dropout
    text = _source(item, data, choice, templates(data) or (OBJECT if tokens else ()))
    if dropped:
        return ""
    text = filled(text, item.name, tokens)
    return _shuffled(text, data.keep_tags, dice) if data.shuffle_tags else text


def filled(text: str, name: str, tokens: Sequence[str]) -> str:
    """``text`` with ``{token}`` and ``{name}`` replaced; other braces stay."""
    return text.replace("{token}", " ".join(tokens)).replace("{name}", name).strip()


def _source(item: Item, data: Data, choice: float, made: tuple[str, ...]) -> str:
    own = item.caption
    if data.captions == "none":
        return ""
    if data.captions == "names":
        return item.name
    if own is not None and data.captions != "template":
        return own
    if data.captions == "files":
        raise UsageProblem(f"{item.path.name} has no caption", hint=f"{item.path.stem}.txt, or data.captions='auto'")
    if made:
        return made[int(choice * len(made))]
    return item.name


def _shuffled(text: str, keep: int, dice: Random) -> str:
    tags = [tag.strip() for tag in text.split(",")]
    rest = tags[keep:]
    dice.shuffle(rest)
    return ", ".join([*tags[:keep], *rest])
