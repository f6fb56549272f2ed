"""JSON documents beside weights: bounded in size and depth before they are parsed, and names in them that become paths."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from hubtool.errors import CorruptFile, UnsafeFile, UnsupportedFile
from hubtool.tensors.reading import open_read, pread_exact
from hubtool.tensors.strict_json import JsonError, TooDeepError, loads, loads_config

MAX_BYTES = 16 << 20
_MAX_DEPTH = 64


def read_json(path: Path, *, strict: bool = False) -> Any:
    """The document in ``path``; ``strict`` refuses duplicate keys and NaN as well.

    Raises ``FileMissing``, ``CorruptFile`` (no JSON), ``UnsafeFile`` (over 16 MiB, or nested too deeply), ``UnsupportedFile`` (a pipe).
    """
    parse = loads if strict else loads_config
    try:
        return parse(_content(path), max_depth=_MAX_DEPTH)
    except TooDeepError as error:
        raise UnsafeFile(str(error), path=path) from None
    except JsonError as error:
        raise CorruptFile(str(error), path=path) from None


def is_plain_name(name: str) -> bool:
    """Whether a name found in a document is one component of a path, on any system, and leads nowhere else."""
    odd = not name.isprintable() or len(os.fsencode(name)) > 255 or set(name) & set('/\\:*?"<>|')
    return bool(name) and not odd and name not in (".", "..") and name == name.strip(" ")


def _content(path: Path) -> bytes:
    fd = open_read(path)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise UnsupportedFile("not a regular file", path=path)
        if status.st_size > MAX_BYTES:
            raise UnsafeFile(f"a JSON document of {status.st_size} bytes; {MAX_BYTES} are the limit", path=path)
        return pread_exact(fd, status.st_size, 0, path)
    finally:
        os.close(fd)
