"""The SQLAlchemy engine: one connection, explicit transactions, the pragmas of ``settings``, driver errors as hubtool errors."""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, RootTransaction, create_engine, event, exc
from sqlalchemy.engine import URL
from sqlalchemy.pool import QueuePool

from hubtool.errors import LibraryLocked, MissingExtra, RegistryError
from hubtool.registry import settings


def make_engine(target: str, *, busy_ms: int = settings.BUSY_MS) -> Engine:
    """An engine for a path or SQLAlchemy URL. Nothing is connected yet."""
    path = settings.sqlite_path(target)
    if path is None:
        return _server_engine(target)
    url = URL.create("sqlite", database=str(path))
    engine = create_engine(url, poolclass=QueuePool, pool_size=1, connect_args={"timeout": busy_ms / 1000})
    event.listen(engine, "connect", _on_connect)
    event.listen(engine, "begin", _on_begin)
    return engine


def _server_engine(url: str) -> Engine:
    try:
        return create_engine(url)
    except exc.ArgumentError as error:
        raise RegistryError(
            f"not a library: {url}", hint="a path, or a URL such as postgresql+psycopg://host/name"
        ) from error
    except ImportError as error:
        raise MissingExtra(f"a library at {url.partition(':')[0]}", "postgres") from error


def _on_connect(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # the driver must not begin transactions of its own: they would be DEFERRED
    for pragma in settings.PRAGMAS:
        connection.execute(pragma)


def _on_begin(connection: Connection) -> None:
    # DEFERRED would lose updates: a reader that turns writer fails at once, whatever the busy timeout (spec/security.md 7).
    mode = connection.get_execution_options().get("hubtool_begin", "IMMEDIATE")
    if mode:
        connection.exec_driver_sql(f"BEGIN {mode}")


@contextmanager
def transaction(engine: Engine, path: Path | None, *, read: bool = False) -> Iterator[Connection]:
    """One transaction: committed when the block ends, rolled back when it raises. Writers queue for ``busy_timeout``."""
    with translated(path), engine.connect() as connection:
        connection.execution_options(hubtool_begin="DEFERRED" if read else "IMMEDIATE")
        with _begin(connection, path):
            yield connection


def _begin(connection: Connection, path: Path | None) -> RootTransaction:
    try:
        return connection.begin()
    except exc.OperationalError as error:
        if not isinstance(settings.translate(error.orig or error, path), LibraryLocked):
            raise
    time.sleep(random.uniform(0.05, 0.25))  # one more try, out of step with whoever took turns with us
    return connection.begin()


@contextmanager
def translated(path: Path | None) -> Iterator[None]:
    """Raise errors of the driver as ``RegistryError`` or ``LibraryLocked``."""
    try:
        yield
    except exc.DBAPIError as error:
        raise settings.translate(error.orig or error, path) from error


def outside_transaction(engine: Engine, path: Path | None, work: Callable[[Connection], Any]) -> Any:
    """Run ``work`` where SQLite allows no transaction (VACUUM INTO, journal_mode)."""
    with translated(path), engine.connect() as connection:
        return work(connection.execution_options(hubtool_begin=None))
