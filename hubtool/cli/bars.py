"""A progress bar with amount, rate and time left; rich is only imported where one is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hubtool.cli.amounts import human_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_BYTES = 1_000_000  # who counts so far counts bytes: no list of files, pictures or steps is as long


class Bar:
    """Counts what is done; a total that was not known at the start may be announced by ``expect``."""

    def __init__(self, bars: Progress, task: TaskID, total: int | None) -> None:
        self._bars, self._task = bars, task
        self._total, self._open = total, total is None

    def __call__(self, n: int = 1) -> None:
        self._bars.advance(self._task, n)

    def expect(self, count: int) -> None:
        """``count`` more than was announced before; nothing where the caller knew the total."""
        if self._open:
            self._total = (self._total or 0) + count
            self._bars.update(self._task, total=self._total)


@contextmanager
def drawn(description: str, total: int | None, console: Console) -> Iterator[Bar]:
    """A bar on ``console`` while the block runs; it vanishes at the end."""
    from rich.progress import Progress

    with Progress(*_columns(), console=console, transient=True) as bars:
        yield Bar(bars, bars.add_task(description, total=total), total)


def _columns() -> list[Any]:
    from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.text import Text

    class Amount(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(amount(task.completed, task.total, task.finished_speed or task.speed))

    class Time(ProgressColumn):
        """What is left; what has passed where nobody knows the end."""

        left, passed = TimeRemainingColumn(compact=True), TimeElapsedColumn()

        def render(self, task: Any) -> Text:
            return self.passed.render(task) if task.total is None else Text("left ").append(self.left.render(task))

    return [TextColumn("{task.description}", markup=False), BarColumn(), Amount(), Time()]


def amount(done: float, total: float | None, speed: float | None) -> str:
    """``1.2 GB of 2.1 GB, 310.0 MB/s`` or ``3 of 12, 0.5/s``; what is not known yet is left out."""
    counts_bytes = max(done, total or 0) >= _BYTES
    written = human_size if counts_bytes else "{:.0f}".format
    text = written(int(done)) if total is None else f"{written(int(done))} of {written(int(total))}"
    if not speed:
        return text
    return f"{text}, {human_size(int(speed))}/s" if counts_bytes else f"{text}, {speed:.3g}/s"
