"""An output that is written at any place by any thread, every byte counted."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from hubtool.tensors.atomic import PAGE, Output
from hubtool.tensors.evaluate import Piece, Range
from hubtool.tensors.reading import Sources, pread_into

Progress = Callable[[int], None]
BUFFER = 2 << 20  # bytes gathered for one write; larger calls of copy_file_range were measured slower


class Target:
    """The output, written at any place by any thread."""

    def __init__(self, output: Output, progress: Progress | None) -> None:
        self._output, self._progress = output, progress
        self._lock = threading.Lock()

    def write(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._output.fd, view, offset)
            self._count(count)
            view, offset = view[count:], offset + count

    def copy(self, source: int, piece: Range, offset: int) -> bool:
        """Copy whole inside the kernel where both sides lie alike in their pages; False when it could not (nothing is lost by then)."""
        if (piece.start - offset) % PAGE:
            return False
        at = piece.start
        while at < piece.end:
            step = min(piece.end - at, BUFFER - at % PAGE)
            try:
                count = os.copy_file_range(source, self._output.fd, step, at, offset + at - piece.start)
            except OSError:  # another disk, or a kernel that cannot: written by hand, and any real trouble shows there
                count = 0
            if not count:
                break
            at += count
        if at == piece.end:
            self._count(len(piece))
        return at == piece.end

    def _count(self, count: int) -> None:
        with self._lock:
            self._output.advance(count)
            if self._progress is not None:
                self._progress(count)


class Buffer:
    """Gathers pieces that follow each other in the output, so that a thousand small tensors are one write."""

    def __init__(self, target: Target, sources: Sources, view: memoryview, start: int) -> None:
        self._target, self._sources, self._view = target, sources, view
        self._start, self._held = start, 0

    @property
    def end(self) -> int:
        """Offset in the output of the next byte."""
        return self._start + self._held

    def take(self, piece: Piece) -> None:
        at = 0
        while at < len(piece):
            count = min(len(piece) - at, len(self._view) - self._held)
            view = self._view[self._held : self._held + count]
            if isinstance(piece, bytes):
                view[:] = piece[at : at + count]
            else:
                pread_into(self._sources.fd(piece.path), view, piece.start + at, piece.path)
            self._held, at = self._held + count, at + count
            if self._held == len(self._view):
                self.flush()

    def flush(self) -> None:
        self._target.write(self._view[: self._held], self._start)
        self._start, self._held = self.end, 0

    def skip(self, count: int) -> None:
        """Go on behind bytes that somebody else wrote."""
        self._start += count
