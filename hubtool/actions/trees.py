"""One hash for an artifact of several files (a PEFT folder, a pipeline, shards): what a SHA-256 is for one file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from hubtool.errors import FileMissing
from hubtool.formats.base import TensorFile

_CHUNK = 1 << 20


def tree_sha256(file: TensorFile, base: bytes) -> str:
    """SHA-256 over the lines ``<sha256>  <name relative to base>`` of every file that was read, sorted by name.

    Raises ``FileMissing`` where nothing was read, and ``OSError``.
    """
    if not file.files:
        raise FileMissing("nothing in it can be hashed", path=file.path)
    digest = hashlib.sha256()
    for path in sorted(os.fsencode(path) for path in file.files):
        digest.update(file_sha256(path).encode() + b"  " + os.path.relpath(path, base) + b"\n")
    return digest.hexdigest()


def file_sha256(path: bytes | str | Path) -> str:
    """SHA-256 of one file, read in steps."""
    digest = hashlib.sha256()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        offset = 0
        while chunk := os.pread(fd, _CHUNK, offset):
            digest.update(chunk)
            offset += len(chunk)
    finally:
        os.close(fd)
    return digest.hexdigest()
