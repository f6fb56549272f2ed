"""Finds the data folders ``schemas/`` and ``migrations/`` in an installed wheel or in a checkout."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from hubtool.errors import HubtoolError

_PACKAGE = Path(__file__).resolve().parent


@cache
def _folder(name: str) -> Path:
    for candidate in (_PACKAGE / f"_{name}", _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise HubtoolError(
        f"the folder {name}/ is missing from this installation", hint="pip install --force-reinstall hubtool"
    )


def schemas() -> Path:
    """Folder of the tables (families, syntaxes, vocabularies) and of the JSON schemas."""
    return _folder("schemas")


def migrations() -> Path:
    """Folder of the Alembic environment."""
    return _folder("migrations")
