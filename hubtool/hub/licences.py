"""Licences and families as the Hub knows them: ``schemas/hub``."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from hubtool.resources import schemas

TASKS = ("text-to-image", "image-to-image", "text-to-video", "image-to-video", "text-to-audio")


@dataclass(frozen=True, slots=True)
class Licence:
    """``id`` is one of the Hub's closed list; ``other`` needs a ``name`` of its own and a ``link`` to the text."""

    id: str
    name: str | None = None
    link: str | None = None

    def front(self) -> dict[str, str]:
        """The fields of a model card."""
        fields = {"license": self.id, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in fields.items() if value}


@cache
def _document(name: str) -> Mapping[str, Any]:
    return tomllib.loads((schemas() / "hub" / f"{name}.toml").read_text("utf-8"))


@cache
def licence_ids() -> frozenset[str]:
    """The ids that the Hub accepts."""
    return frozenset(_document("licences")["ids"])


def licence_of(base_models: Sequence[str], family: str | None) -> Licence | None:
    """The licence that the base hands down; None where it is not known."""
    table = _document("licences")
    rows = [table["base_models"].get(name) for name in base_models] + [table["families"].get(family)]
    found = next((row for row in rows if row), None)
    return Licence(**found) if found else None


def task_of(family: str | None) -> str | None:
    """The Hub's ``pipeline_tag`` for a family."""
    table = _document("families")
    return next((task for task in TASKS if family in table[task]), None)


def tags_of(family: str | None) -> tuple[str, ...]:
    """The tags by which models of a family are found."""
    return tuple(_document("families")["tags"].get(family or "", (family,) if family else ()))
