"""Reading a library with ``sqlite3`` alone: importing SQLAlchemy would cost ``ls`` more than the query does.

Both readers run the same SQL text of ``registry.browse``; a test compares what they return.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hubtool.registry import settings


class FastReader:
    """A read-only connection: one consistent view for as long as it is open, so keep it open briefly."""

    def __init__(self, path: Path, *, busy_ms: int = settings.BUSY_MS) -> None:
        """Open ``path``. Raises SchemaOutdated, LibraryLocked, or RegistryError for what is not a library."""
        self.path = path
        with self._translated():
            self._connection = _connect(path, busy_ms)
            try:
                settings.check_header(*self._header(), path)
                self._connection.execute("BEGIN")
            except BaseException:
                self._connection.close()
                raise

    def _header(self) -> tuple[int, int]:
        application = self._connection.execute("PRAGMA application_id").fetchone()[0]
        return application, self._connection.execute("PRAGMA user_version").fetchone()[0]

    def rows(self, sql: str, parameters: dict[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """The rows of a SELECT with ``:name`` parameters (``records.Reader``)."""
        with self._translated():
            return self._connection.execute(sql, parameters or {}).fetchall()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise settings.translate(error, self.path) from error

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _connect(path: Path, busy_ms: int) -> sqlite3.Connection:
    # mode=rw lets SQLite roll back the journal of a killed writer; query_only forbids everything else. A library on a
    # read-only disk is opened by SQLite itself as read-only.
    connection = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=busy_ms / 1000, isolation_level=None)
    for pragma in (*settings.PRAGMAS, "PRAGMA query_only = ON"):
        connection.execute(pragma)
    return connection
