"""Fingerprints of inputs that are taken while the output is written: until then marks of their length stand in the header."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from hubtool.actions.recipe import Hashes
from hubtool.formats import open_file

LARGE = 1 << 30  # bytes: hashing a larger input takes longer than what is done with it, and waits until somebody asks


def large(path: Path) -> bool:
    """Whether a file, or the weights in a folder, are ``LARGE``."""
    files = open_file(path).files if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files) > LARGE


class LateHashes:
    """``paths`` are hashed in the background; ``known`` fingerprints (None: not known) count as they are."""

    def __init__(self, paths: Sequence[Path], known: Mapping[Path, str | None]) -> None:
        self._known = {path: sha256 for path, sha256 in known.items() if sha256 is not None}
        self._marks = {path: secrets.token_hex(32) for path in paths if path not in self._known}
        self._hashes = Hashes(list(self._marks))

    def mark(self, path: Path) -> str | None:
        """What stands for the fingerprint of an input; None where it is not taken."""
        return self._known.get(path) or self._marks.get(path)

    def complete(self, data: bytes) -> bytes:
        """``data`` with fingerprints in the place of marks, once they are all taken."""
        for path, mark in self._marks.items():
            data = data.replace(mark.encode(), self._hashes.of(path).encode())
        return data
