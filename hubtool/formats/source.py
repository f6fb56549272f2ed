"""Bounded reads from an open file by position; a small file is read once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hubtool.errors import CorruptFile
from hubtool.tensors.reading import pread_exact

_WHOLE = 128 << 10


@dataclass(frozen=True, slots=True)
class Source:
    """A file by descriptor. ``whole`` holds the bytes of a file that is small enough to be read in one go."""

    path: Path
    fd: int
    size: int
    whole: bytes | None = None

    @classmethod
    def of(cls, path: Path, fd: int, size: int) -> Source:
        """A source for an open file of ``size`` bytes."""
        return cls(path, fd, size, pread_exact(fd, size, 0, path) if size <= _WHOLE else None)

    def read(self, start: int, count: int) -> bytes:
        """Exactly ``count`` bytes at ``start``. Raises ``CorruptFile`` where the file has fewer."""
        if start < 0 or count < 0 or start + count > self.size:
            raise CorruptFile(f"{count} bytes are claimed beyond the end of the file", path=self.path, offset=start)
        if self.whole is not None:
            return self.whole[start : start + count]
        return pread_exact(self.fd, count, start, self.path)
