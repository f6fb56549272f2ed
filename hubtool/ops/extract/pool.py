"""Workers that take work apart by tensors: one intra-op thread each, the largest first, in buffers that are used again."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from hubtool.tensors.dtypes import BITS, numel
from hubtool.tensors.evaluate import compute, is_bytes, torch_dtype
from hubtool.tensors.expr import Cast, Expr
from hubtool.tensors.reading import Sources
from hubtool.tensors.tiles import Bench, Window

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int], None]
_MEMORY = 320 << 20  # bytes of fp32 that jobs under way may hold together; a larger one runs alone


class Room:
    """A worker's place: open files, and memory that stays from job to job."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.sources = Sources()
        self.bench = Bench(self.sources, device)
        self._buffer: Tensor | None = None

    def buffer(self, count: int) -> Tensor:
        """``count`` fp32 numbers on the device, valid until the next call."""
        import torch

        if self._buffer is None or len(self._buffer) < count:
            self._buffer = None  # the old one goes before the new one comes
            self._buffer = torch.empty(count, dtype=torch.float32, device=self.device)
        return self._buffer[:count]

    def tiles(self, *exprs: Expr) -> Iterator[tuple[int, int, tuple[Tensor, ...]]]:
        """(start, stop, the elements of each expression in its own dtype) over flat pieces of expressions of one size.

        A tile is valid until the next one is asked for; it lies in host memory.
        """
        readers = [self._reader(slot, expr) for slot, expr in enumerate(exprs)]
        total = numel(exprs[0].shape)
        for start in range(0, total, self.bench.tile):
            stop = min(start + self.bench.tile, total)
            yield start, stop, tuple(read(start, stop) for read in readers)

    def _reader(self, slot: int, expr: Expr) -> Callable[[int, int], Tensor]:
        if not is_bytes(expr):
            whole = compute(expr).reshape(-1)
            return lambda start, stop: whole[start:stop]
        source = expr.source if isinstance(expr, Cast) else expr
        window, item, dtype = Window(source, self.sources), BITS[source.dtype] // 8, torch_dtype(source.dtype)

        def read(start: int, stop: int) -> Tensor:
            raw, view = self.bench.raw(slot, (stop - start) * item)
            window.read(view, start * item)
            return raw.view(dtype)

        return read


class _Memory:
    """Bytes that jobs share; one that needs more than all of them waits until it is alone."""

    def __init__(self) -> None:
        self._held = 0
        self._freed = threading.Condition()

    @contextmanager
    def held(self, amount: int) -> Iterator[None]:
        with self._freed:
            self._freed.wait_for(lambda: not self._held or self._held + amount <= _MEMORY)
            self._held += amount
        try:
            yield
        finally:
            with self._freed:
                self._held -= amount
                self._freed.notify_all()


def run(
    jobs: Sequence[T],
    work: Callable[[T, Room], R],
    weight: Callable[[T], int],
    *,
    device: str = "cpu",
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[R]:
    """``work(job, room)`` for every job, results in the order of the jobs. ``weight``: fp32 bytes of a job.

    ``progress`` is called with the weight of each job done. The first error stops the others and is raised; inputs that changed
    meanwhile raise ``CorruptFile``.
    """
    memory, local, rooms, lock = _Memory(), threading.local(), list[Room](), threading.Lock()

    def one(job: T) -> R:
        with memory.held(weight(job)):
            result = work(job, local.room)
        if progress is not None:
            with lock:
                progress(weight(job))
        return result

    def enter() -> None:
        import torch

        torch.set_num_threads(1)  # counts for the calling thread: a module per worker beats many threads for a module
        local.room = Room(device)
        rooms.append(local.room)

    order = sorted(range(len(jobs)), key=lambda i: -weight(jobs[i]))
    with _threads(workers, enter) as pool:
        futures: dict[int, Future[R]] = {i: pool.submit(one, jobs[i]) for i in order}
        results = [futures[i].result() for i in range(len(jobs))]
    for room in rooms:
        with room.sources:
            pass  # closing compares every file with what it was
    return results


@contextmanager
def _threads(workers: int | None, enter: Callable[[], None]) -> Iterator[ThreadPoolExecutor]:
    """A pool that drops what is waiting when it is left by an error; torch's threads are afterwards what they were."""
    import torch

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)), "hubtool", enter)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
