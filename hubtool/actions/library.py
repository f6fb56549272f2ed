"""Where the library is and how it is opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hubtool.actions.where import default_target
from hubtool.registry import settings
from hubtool.registry.fast import FastReader
from hubtool.registry.records import Reader

if TYPE_CHECKING:
    from hubtool.registry.store import Store


def open_store(library: str | None = None) -> Store:
    """Open for writing; a library that does not exist yet is made. Raises SchemaOutdated, LibraryLocked."""
    from hubtool.registry.store import Store

    return Store.open(default_target(library))


@contextmanager
def reading(library: str | None = None) -> Iterator[Reader]:
    """Open for reading: with ``sqlite3`` alone where the library is a file (no SQLAlchemy: ``ls`` starts 0.2 s sooner)."""
    target = default_target(library)
    path = settings.sqlite_path(target)
    if path is None:
        with open_store(target) as store:
            yield store
        return
    if not path.exists():
        open_store(target).close()
    with FastReader(path) as reader:
        yield reader
