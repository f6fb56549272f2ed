"""One HTML page with small pictures of everything that was kept or dropped, and why. It needs no other file."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

_SIDE = 160
_STYLE = """
:root { color-scheme: light dark; } body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
ul { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 1rem; list-style: none; padding: 0; }
li { border: 1px solid #8884; border-radius: 6px; padding: .5rem; overflow-wrap: anywhere; } img { max-width: 100%; display: block; }
small { color: #767676; } table { border-collapse: collapse; } td { padding: 0 1rem 0 0; } td + td { text-align: right; }
"""


@dataclass(frozen=True, slots=True)
class Card:
    """``name`` of the file, the lines below its picture, small pictures as data URIs."""

    name: str
    lines: tuple[str, ...]
    pictures: tuple[str, ...] = ()


def thumbnail(picture: Any) -> str:
    """A small JPEG as a data URI."""
    small = picture.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def page(title: str, kept: list[Card], dropped: list[Card], sizes: Counter[str]) -> str:
    """The whole document."""
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{len(kept)} pictures kept, {len(dropped)} dropped.</p>",
        "<table><caption>Sizes</caption>", *(f"<tr><td>{size}</td><td>{count}</td></tr>" for size, count in sorted(sizes.items())),
        "</table>", "<h2>Dropped</h2>" if dropped else "", *_list(dropped), "<h2>Kept</h2>", *_list(kept),
    ]  # fmt: skip
    return head + "\n".join(body) + "</html>\n"


def _list(cards: Iterable[Card]) -> Iterator[str]:
    yield "<ul>"
    for card in cards:
        name = html.escape(card.name)
        yield "<li>" + "".join(f'<img src="{one}" alt="{name}" loading="lazy">' for one in card.pictures)
        yield (
            f"<strong>{name}</strong>"
            + "".join(f"<br><small>{html.escape(line)}</small>" for line in card.lines)
            + "</li>"
        )
    yield "</ul>"
