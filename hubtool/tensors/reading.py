"""Reading by position: pread only (a mapped file that shrinks kills the process), with every short read noticed."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from types import TracebackType

from hubtool.errors import CorruptFile, FileError, FileMissing

_OPEN_AT_ONCE = 32


def open_read(path: Path) -> int:
    """Open for reading: no inheritance, and no waiting on a FIFO. Errors: ``FileMissing``, ``FileError``."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise FileMissing("no such file", path=path) from None
    except (OSError, ValueError) as error:
        raise FileError(f"cannot open: {error}", path=path) from error


def pread_exact(fd: int, length: int, offset: int, path: Path) -> bytes:
    """``length`` bytes at ``offset``. Raises ``CorruptFile`` where the file ends early."""
    data = os.pread(fd, length, offset)
    if len(data) == length:
        return data
    buffer = bytearray(length)
    pread_into(fd, memoryview(buffer), offset, path)
    return bytes(buffer)


def pread_into(fd: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill ``view`` from ``offset``. One call of the kernel moves at most 2 GiB, hence the loop."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise CorruptFile("the file ends inside a tensor", path=path, offset=offset + done)
        done += count


class Sources:
    """Open input files of one evaluation. On leaving, a file that changed while it was read raises ``CorruptFile``."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._seen: dict[Path, tuple[int, ...]] = {}

    def fd(self, path: Path) -> int:
        """Descriptor of ``path``; the least recently used one is closed when many are open."""
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        if len(self._open) >= _OPEN_AT_ONCE:
            self._close(*self._open.popitem(last=False))
        fd = self._open[path] = open_read(path)
        self._check(path, fd)
        return fd

    def _close(self, path: Path, fd: int) -> None:
        try:
            self._check(path, fd)
        finally:
            os.close(fd)

    def _check(self, path: Path, fd: int) -> None:
        status = os.fstat(fd)
        stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._seen.setdefault(path, stamp) != stamp:
            raise CorruptFile("the file changed while it was being read", path=path)

    def __enter__(self) -> Sources:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._open:
            path, fd = self._open.popitem()
            if error is None:
                self._close(path, fd)
            else:
                os.close(fd)
