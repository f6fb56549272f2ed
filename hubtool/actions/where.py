"""Where the library is, decided without importing anything of it."""

from __future__ import annotations

import os
from pathlib import Path


def default_target(library: str | None = None) -> str:
    """The library meant by ``--library``, else by HUBTOOL_LIBRARY, else the one in the user's data folder."""
    if named := library or os.environ.get("HUBTOOL_LIBRARY"):
        return named
    from platformdirs import user_data_path

    return str(user_data_path("hubtool") / "library.sqlite3")


def library_exists(library: str | None = None) -> bool:
    """Whether there is a library to read: a file that exists, or any database named by a URL."""
    target = default_target(library)
    return "://" in target or Path(target).expanduser().exists()
