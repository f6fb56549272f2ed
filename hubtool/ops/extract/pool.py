"""Workers that take work apart by tensors: one intra-op thread each, the largest first, in buffers that are used again."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from hubtool.tensors.device import check_device
from hubtool.tensors.dtypes import BITS, numel
from hubtool.tensors.evaluate import compute, is_bytes, torch_dtype
from hubtool.tensors.expr import Cast, Expr
from hubtool.tensors.progress import expect
from hubtool.tensors.reading import Sources
from hubtool.tensors.tiles import Bench, Window

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int], None]
MEMORY = 256 << 20  # bytes that jobs under way may hold together; a larger one runs alone


class Room:
    """A worker's place: open files, and memory that stays from job to job."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.sources = Sources()
        self.bench = Bench(self.sources, device)
        self._buffer: Tensor | None = None
        self._halves: Tensor | None = None

    def halves(self, count: int) -> Tensor:
        """``count`` bf16 numbers in host memory, valid until the next call."""
        import torch

        if self._halves is None or len(self._halves) < count:
            self._halves = None
            self._halves = torch.empty(count, dtype=torch.bfloat16)
        return self._halves[:count]

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


class _Queue:
    """Jobs by weight, largest first; a worker takes the largest that fits into the memory others leave, or any when it is alone."""

    def __init__(self, weights: Sequence[int], memory: int | None) -> None:
        self._weights, self._memory = weights, memory
        self._left = sorted(range(len(weights)), key=lambda i: -weights[i])
        self._held = 0
        self._freed = threading.Condition()

    def take(self) -> int | None:
        """Index of a job; None when none is left."""
        with self._freed:
            while self._left:
                at = next((at for at, i in enumerate(self._left) if self._fits(self._weights[i])), None)
                if at is not None:
                    index = self._left.pop(at)
                    self._held += self._weights[index]
                    return index
                self._freed.wait()
            return None

    def _fits(self, weight: int) -> bool:
        return self._memory is None or not self._held or self._held + weight <= self._memory

    def done(self, index: int) -> None:
        with self._freed:
            self._held -= self._weights[index]
            self._freed.notify_all()

    def stop(self) -> None:
        """Nobody takes a job any more."""
        with self._freed:
            self._left.clear()
            self._freed.notify_all()


def run(
    jobs: Sequence[T],
    work: Callable[[T, Room], R],
    weight: Callable[[T], int],
    *,
    device: str = "cpu",
    workers: int | None = None,
    progress: Progress | None = None,
    memory: int | None = MEMORY,
) -> list[R]:
    """``work(job, room)`` for every job, results in the order of the jobs. ``weight``: bytes that a job takes or reads.

    ``memory``: bytes that jobs under way may take together, None for jobs that read in tiles. ``progress`` is called with the weight of each job done. The first error stops the others and is raised; inputs that changed
    meanwhile raise ``CorruptFile``, a device that is not there ``UsageProblem``.
    """
    check_device(device)
    weights = [weight(job) for job in jobs]
    expect(progress, sum(weights))
    queue, results, lock = _Queue(weights, memory), dict[int, R](), threading.Lock()

    def loop() -> None:
        import torch

        torch.set_num_threads(1)  # counts for the calling thread: a module per worker beats many threads for a module
        room = Room(device)
        with room.sources:
            while (index := queue.take()) is not None:
                results[index] = work(jobs[index], room)
                queue.done(index)
                if progress is not None:
                    with lock:
                        progress(weights[index])

    count = min(workers or len(os.sched_getaffinity(0)), max(len(jobs), 1))
    with _threads(count, queue) as pool:
        futures = [pool.submit(loop) for _ in range(count)]
        for future in as_completed(futures):
            future.result()
    return [results[i] for i in range(len(jobs))]


@contextmanager
def _threads(count: int, queue: _Queue) -> Iterator[ThreadPoolExecutor]:
    """A pool whose workers find nothing more to do when it is left by an error; torch's threads are afterwards what they were."""
    import torch

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "hubtool")
    try:
        yield pool
    finally:
        queue.stop()
        pool.shutdown()
        torch.set_num_threads(before)
