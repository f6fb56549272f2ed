"""Hashing what a hub sends while it arrives: SHA256 for LFS and Xet files, git's blob sha1 for the others."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol


class Listed(Protocol):
    """A file as listed: its size and the hashes it must have."""

    @property
    def size(self) -> int: ...

    @property
    def sha256(self) -> str | None: ...


class Checker:
    """The hash of a listed file, fed with its content from the beginning."""

    def __init__(self, entry: Listed) -> None:
        self._hash: Any = (
            hashlib.sha256() if entry.sha256 else hashlib.sha1(b"blob %d\0" % entry.size, usedforsecurity=False)
        )

    def update(self, data: bytes | memoryview) -> None:
        self._hash.update(data)

    def hexdigest(self) -> str:
        return str(self._hash.hexdigest())

    def of(self, data: bytes) -> str:
        """The digest of ``data`` alone."""
        self.update(data)
        return self.hexdigest()
