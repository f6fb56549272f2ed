"""How far a long job is: a function that is told the bytes just done, and may want to know beforehand how many there will be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

Progress = Callable[[int], None]


@runtime_checkable
class Meter(Protocol):
    """A ``Progress`` that shows a share and the time left."""

    def __call__(self, n: int, /) -> None:
        """``n`` more bytes are done."""

    def expect(self, count: int) -> None:
        """So many bytes are still to come, beside those announced before."""


def expect(progress: Progress | None, count: int) -> None:
    """Announce ``count`` bytes to whoever wants to know."""
    if isinstance(progress, Meter):
        progress.expect(count)
