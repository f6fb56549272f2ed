"""Civitai's permissions as a licence of the Hub (spec/hub.md 5): ``other``, with a text made of what the author allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hubtool.hub.licences import Licence

FILE = "LICENSE.md"
LICENCE = Licence("other", "civitai-permissions", FILE)
_FORBIDDEN = (
    ("allowDerivatives", "shared changed or merged"),
    ("allowDifferentLicense", "published under other terms than its author's"),
)
_USES = {
    "Image": "sell images made with it", "RentCivit": "run it on Civitai's generator", "Rent": "run it on paid services",
    "Sell": "sell it or merges of it",
}  # fmt: skip


def forbidden(permissions: Mapping[str, Any]) -> list[str]:
    """What the author's permissions say must not be done, in words."""
    return [words for flag, words in _FORBIDDEN if permissions.get(flag) is False]


def text(permissions: Mapping[str, Any], creator: str | None, page: str | None) -> str:
    """The licence text: what was said, nothing more."""
    origin = f"Published at {page} by {creator or 'its author'}.\n\n" if page else ""
    return "# Permissions of the author\n\n" + origin + "\n".join(_lines(permissions)) + "\n"


def _lines(permissions: Mapping[str, Any]) -> Iterator[str]:
    said = permissions.get("allowCommercialUse")
    uses = said if isinstance(said, list) else [said] if isinstance(said, str) else []
    for use, words in _USES.items():
        yield f"- {'You may' if use in uses else 'You may not'} {words}."
    yield f"- {'No credit is needed.' if permissions.get('allowNoCredit') is True else 'Credit the author.'}"
    yield f"- {'You may not' if permissions.get('allowDerivatives') is False else 'You may'} share it changed or merged."
    same = permissions.get("allowDifferentLicense") is False
    yield f"- What you make of it {'keeps these permissions' if same else 'may have other permissions'}."
