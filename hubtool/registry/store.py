"""``Store``: an open library. Transactions in, plain records out; the writing itself lives in ``scanning``, ``hashing`` and ``lineage``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection, Engine, text

from hubtool.errors import NotFound
from hubtool.registry import schema, settings
from hubtool.registry.engine import make_engine, transaction


class Store:
    """An open library. Use it in a ``with`` block; it holds no connection between transactions."""

    def __init__(self, engine: Engine, path: Path | None) -> None:
        self.engine = engine
        self.path = path

    @classmethod
    def open(cls, target: str | Path, *, create: bool = True, busy_ms: int = settings.BUSY_MS) -> Self:
        """Open the library at a path or SQLAlchemy URL; a new one is made when there is none and ``create`` holds.

        Raises SchemaOutdated for another schema, RegistryError for another program's file, NotFound without ``create``.
        """
        store = cls.unchecked(target, create=create, busy_ms=busy_ms)
        with transaction(store.engine, store.path, read=True) as connection:
            fresh = schema.is_empty(connection)
            found = schema.header(connection)
        if fresh:
            schema.upgrade(store.engine, store.path)
        else:
            settings.check_header(*found, store.path)
        return store

    @classmethod
    def unchecked(cls, target: str | Path, *, create: bool = False, busy_ms: int = settings.BUSY_MS) -> Self:
        """Open without looking at the schema: for ``db upgrade`` and ``db check``."""
        path = settings.sqlite_path(str(target))
        if path is not None and not path.exists():
            if not create:
                raise NotFound("there is no library here", path=path, hint="hubtool scan FOLDER makes one")
            path.parent.mkdir(parents=True, exist_ok=True)
        return cls(make_engine(str(target), busy_ms=busy_ms), path)

    def transaction(self) -> AbstractContextManager[Connection]:
        """One writing transaction (BEGIN IMMEDIATE). Keep it short: hash and parse before it begins."""
        return transaction(self.engine, self.path)

    def reading(self) -> AbstractContextManager[Connection]:
        """One consistent view for several SELECTs."""
        return transaction(self.engine, self.path, read=True)

    def rows(self, sql: str, parameters: dict[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """The rows of a SELECT with ``:name`` parameters (``records.Reader``)."""
        with self.reading() as connection:
            return [tuple(row) for row in connection.execute(text(sql), parameters or {})]

    def close(self) -> None:
        self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
