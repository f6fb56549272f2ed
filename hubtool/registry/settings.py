"""How hubtool uses SQLite, without SQLAlchemy: constants, pragmas, and the errors of ``sqlite3`` as errors of hubtool.

Every choice is argued in ``spec/security.md`` 7. The database file is never opened by path except through SQLite itself: closing
any other descriptor of it in the same process would drop SQLite's POSIX locks.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Iterable
from pathlib import Path

from hubtool.errors import LibraryLocked, RegistryError, SchemaOutdated

APPLICATION_ID = 0x48754254  # "HuBT", in the header of every library file
SCHEMA_VERSION = 2  # PRAGMA user_version: the number of migrations applied
BUSY_MS = 15_000
_WAL_SAFE = (3, 51, 3)  # earlier releases can lose a WAL reset (spec/security.md 7)
_LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay", "apfs"})

PRAGMAS = (
    "PRAGMA foreign_keys = ON",
    "PRAGMA trusted_schema = OFF",
    "PRAGMA cell_size_check = ON",
    "PRAGMA mmap_size = 0",
    "PRAGMA synchronous = FULL",
)


def is_url(target: str) -> bool:
    """Whether a library is named by a SQLAlchemy URL rather than by a path."""
    return "://" in target


def sqlite_path(target: str) -> Path | None:
    """The SQLite file behind ``target`` (a path or ``sqlite:///`` URL); None for another database."""
    if not is_url(target):
        return Path(target).expanduser().absolute()
    scheme, _, rest = target.partition("://")
    if scheme.partition("+")[0] != "sqlite":
        return None
    return Path(rest.removeprefix("/")).expanduser().absolute()


def journal_mode(path: Path) -> str:
    """``wal`` only where it is safe: a repaired SQLite and a file system known to be local. Else ``delete``."""
    if sqlite3.sqlite_version_info < _WAL_SAFE or not sys.platform.startswith("linux"):
        return "delete"
    return (
        "wal" if _filesystem(path.parent, Path("/proc/mounts").read_text("utf-8").splitlines()) in _LOCAL else "delete"
    )


def _filesystem(folder: Path, mounts: Iterable[str]) -> str:
    """Type of the file system that holds ``folder``: the longest mount point that is a parent of it."""
    best, found = -1, ""
    for line in mounts:
        point, kind = line.split(" ")[1:3]
        point = point.replace("\\040", " ")
        if len(point) > best and folder.is_relative_to(point):
            best, found = len(point), kind
    return found


def check_header(application: int, version: int, path: Path | None) -> None:
    """Refuse a file of another program, of a newer hubtool, or of an older one that has not been upgraded."""
    if application != APPLICATION_ID:
        raise RegistryError(
            "this SQLite file belongs to another program", path=path, hint="name another file with --library"
        )
    if version > SCHEMA_VERSION:
        raise SchemaOutdated(
            f"the library has schema {version}, this hubtool knows up to {SCHEMA_VERSION}",
            path=path,
            hint="pip install -U hubtool",
        )
    if version < SCHEMA_VERSION:
        raise SchemaOutdated(
            f"the library has schema {version}, this hubtool needs {SCHEMA_VERSION}",
            path=path,
            hint="hubtool db upgrade",
        )


def translate(error: BaseException, path: Path | None) -> RegistryError:
    """The hubtool error for an error of ``sqlite3``."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
        return LibraryLocked(
            "another process is writing to the library", path=path, hint="try again when it has finished"
        )
    if code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
        return RegistryError(f"the library is damaged or not a database: {error}", path=path, hint="hubtool db check")
    return RegistryError(f"the library failed: {error}", path=path)


def file_ids(path: Path) -> set[tuple[int, int]]:
    """(st_dev, st_ino) of the library's own files, which no scan may open."""
    ids = set()
    for suffix in ("", "-journal", "-wal", "-shm"):
        try:
            status = os.stat(f"{path}{suffix}")
        except OSError:
            continue
        ids.add((status.st_dev, status.st_ino))
    return ids
