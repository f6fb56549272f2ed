"""Finds the data folders ``schemas/`` and ``migrations/`` in an installed wheel or in a checkout, and reads their tables.

``schemas/parsed.json.gz`` keeps every table as the JSON of its TOML beside a checksum (``python -m tests.tables index`` writes it): a
conversion needs twenty tables, and parsing TOML takes ten times as long. A table that was edited since is parsed as it stands.
"""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

from hubtool.errors import HubtoolError, TableError

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


def table(name: str) -> dict[str, Any]:
    """A new copy of the table ``schemas/NAME`` (``families/sdxl.toml``). Raises ``TableError``."""
    path = schemas() / name
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise TableError(f"{name}: {error.strerror}", path=path) from error
    checksum, text = _parsed().get(name, (None, ""))
    document: dict[str, Any] = json.loads(text) if checksum == zlib.crc32(raw) else parse(raw, path)
    return document


def parse(raw: bytes, path: Path) -> dict[str, Any]:
    """A table from its TOML. Raises ``TableError``."""
    import tomllib

    try:
        return tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TableError(f"{path.name}: {error}", path=path) from error


def unpacked(path: Path) -> bytes:
    """The content of a gzip file of ``schemas/``, without the libraries that the gzip module brings along."""
    return zlib.decompress(path.read_bytes(), wbits=31)


@cache
def _parsed() -> dict[str, tuple[int, str]]:
    """name -> (checksum of the TOML, its content as JSON)."""
    path = schemas() / "parsed.json.gz"
    documents: dict[str, tuple[int, str]] = json.loads(unpacked(path)) if path.is_file() else {}
    return documents
