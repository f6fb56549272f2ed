"""Creating, upgrading, checking and backing up a library. Alembic is imported only to create or upgrade."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text

from hubtool import resources
from hubtool.errors import RegistryError, SchemaOutdated
from hubtool.registry import hub_models, settings
from hubtool.registry.engine import outside_transaction, transaction

HEAD = "0002"
KEEP_BACKUPS = 3
METADATA = hub_models.hub_origin.metadata  # every table: importing hub_models adds its own to those of models


@dataclass(frozen=True, slots=True)
class Check:
    """Result of ``db check``: each list is empty for a healthy library. ``schema``: the revision found."""

    integrity: tuple[str, ...]
    foreign_keys: tuple[str, ...]
    schema: str | None

    @property
    def ok(self) -> bool:
        return not self.integrity and not self.foreign_keys and self.schema == HEAD


def header(connection: Connection) -> tuple[int, int]:
    """(application_id, schema version) of the library."""
    if connection.dialect.name != "sqlite":
        return settings.APPLICATION_ID, _version_of(revision(connection))
    application = connection.exec_driver_sql("PRAGMA application_id").scalar_one()
    version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
    return int(application), int(version)


def _version_of(found: str | None) -> int:
    return int(found) if found and found.isdigit() else 0


def revision(connection: Connection) -> str | None:
    """The Alembic revision stored in the database; None before the first migration."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return None if found is None else str(found)


def is_empty(connection: Connection) -> bool:
    """Whether the database holds no table at all: a file that SQLite has just made."""
    return not inspect(connection).get_table_names()


def upgrade(engine: Engine, path: Path | None) -> tuple[str | None, str]:
    """Bring the schema to HEAD in one transaction; (revision before, revision after). A library with content is backed up first."""
    with transaction(engine, path, read=True) as connection:
        empty, before = is_empty(connection), revision(connection)
        application, version = header(connection)
    if not empty:
        _refuse_unknown(application, version, path)
    if before == HEAD:
        return before, HEAD
    if path is not None and not empty:
        backup(engine, path)
    elif path is not None:
        mode = settings.journal_mode(path)
        outside_transaction(
            engine, path, lambda connection: connection.exec_driver_sql(f"PRAGMA journal_mode = {mode}")
        )
    with transaction(engine, path) as connection:
        _migrate(connection)
        _stamp(connection, path)
    return before, HEAD


def _refuse_unknown(application: int, version: int, path: Path | None) -> None:
    try:
        settings.check_header(application, version, path)
    except SchemaOutdated:
        if version > settings.SCHEMA_VERSION:
            raise


def _migrate(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(resources.migrations()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, HEAD)


def _stamp(connection: Connection, path: Path | None) -> None:
    if path is None:
        return
    if broken := connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall():
        raise RegistryError(f"the upgrade left {len(broken)} dangling references; nothing was changed", path=path)
    connection.exec_driver_sql(f"PRAGMA application_id = {settings.APPLICATION_ID}")
    connection.exec_driver_sql(f"PRAGMA user_version = {settings.SCHEMA_VERSION}")


def check(engine: Engine, path: Path | None) -> Check:
    """``integrity_check``, ``foreign_key_check`` and the schema revision. Writes nothing."""
    with transaction(engine, path, read=True) as connection:
        if path is None:
            return Check((), (), revision(connection))
        integrity = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA integrity_check")]
        broken = [
            f"{row[0]} row {row[1]} -> {row[2]}" for row in connection.exec_driver_sql("PRAGMA foreign_key_check")
        ]
        return Check(tuple(line for line in integrity if line != "ok"), tuple(broken), revision(connection))


def backup(engine: Engine, path: Path, target: Path | None = None) -> Path:
    """Write a consistent, compacted copy with VACUUM INTO; by default beside the library, where the newest three are kept."""
    made = target or _backup_name(path)
    if made.exists():
        raise RegistryError("the backup exists already", path=made, hint="name another file")
    part = made.with_name(f"{made.name}.part")
    part.unlink(missing_ok=True)
    outside_transaction(engine, path, lambda connection: connection.exec_driver_sql("VACUUM INTO ?", (str(part),)))
    _publish(part, made)
    if target is None:
        for old in backups(path)[:-KEEP_BACKUPS]:
            old.unlink(missing_ok=True)
    return made


def _backup_name(path: Path) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    first = path.with_name(f"{path.stem}.backup-{stamp}Z{path.suffix}")
    candidates = (first.with_name(f"{path.stem}.backup-{stamp}Z-{n}{path.suffix}") for n in range(1, 1000))
    return first if not first.exists() else next(name for name in candidates if not name.exists())


def backups(path: Path) -> list[Path]:
    """The automatic backups beside the library, oldest first."""
    return sorted(
        path.parent.glob(f"{path.stem}.backup-*{path.suffix}"), key=lambda found: (found.stat().st_mtime_ns, found.name)
    )


def _publish(part: Path, made: Path) -> None:
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(part, made)
