"""Writes a safetensors file with several threads: every tensor's place is planned, so each is computed and written by itself.

The bytes never depend on the number of workers: a tensor is computed by one thread, with one intra-op thread, in tiles that its shape
alone decides. Bytes of files are copied beside. Measured facts: spec/performance.md c to f.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from hubtool.errors import BadValues, FileError, ShapeMismatch
from hubtool.tensors import header as headers
from hubtool.tensors.atomic import Output, atomic_file
from hubtool.tensors.dtypes import numel
from hubtool.tensors.evaluate import Context, Range, chunks, coalesce, compute, is_bytes, pieces
from hubtool.tensors.expr import Compute, Concat, Expr, Reshape, size, sources
from hubtool.tensors.jobs import Job, Placed, jobs_of
from hubtool.tensors.places import BUFFER, Buffer, Target
from hubtool.tensors.reading import Sources
from hubtool.tensors.tiles import Bench, tiled, tiles
from hubtool.tensors.writer import head

Progress = Callable[[int], None]
_MEMORY = 256 << 20  # bytes that whole-tensor computations may take together; a larger one runs without others
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT = 64 << 20


def write_safetensors_parallel(
    path: Path,
    tensors: Mapping[str, Expr],
    metadata: Mapping[str, str] | None = None,
    *,
    force: bool = False,
    header: bytes | None = None,
    workers: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    late: Callable[[bytes], bytes] | None = None,
) -> int:
    """Write ``tensors`` in mapping order, atomically, and return the bytes of the file; ``header`` as in ``write_safetensors``.

    ``workers``: threads, by default one for each processor that may be used. ``device``: where tensors are computed (``cpu``, ``cuda``).
    ``progress`` is called with the bytes just written, from any thread, one call at a time. ``late`` is given the header once the tensors
    are written, and returns the one that counts, of the same length: for hashes that are taken meanwhile. Raises ``WouldOverwrite``, ``FileError``,
    ``BadValues`` and what evaluating raises; then nothing was written.
    """
    header, order = head(path, tensors, metadata, header)
    total = 8 + len(header) + sum(size(expr) for expr in tensors.values())
    with atomic_file(path, total, force=force) as output:
        output.write(len(header).to_bytes(8, "little") + header)
        placed = list(_placed(order, tensors, 8 + len(header)))
        write_placed(output, placed, workers=workers, device=device, progress=progress)
        if late is not None:
            _replace_header(output.fd, header, late(header), path)
        headers.read(output.fd, total, path)
    return total


def write_placed(
    output: Output,
    placed: Sequence[Placed],
    *,
    workers: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> None:
    """Write tensors to their places in an output that is open, in any order; whatever lies between them is the caller's."""
    crew = _Crew(jobs_of(placed), Target(output, progress), device)
    _keep_freed_memory()
    with _unchanged(placed), _single_threaded():
        crew.run(workers or len(os.sched_getaffinity(0)))


def _replace_header(fd: int, before: bytes, after: bytes, path: Path) -> None:
    if len(after) != len(before) or os.pwrite(fd, after, 8) != len(after):
        raise FileError("the header could not be completed", path=path)


def _placed(order: Iterable[str], tensors: Mapping[str, Expr], start: int) -> Iterator[Placed]:
    for name in order:
        yield Placed(name, tensors[name], start)
        start += size(tensors[name])


class _Budget:
    """Memory that computations under way share; one that needs more than all of it waits until it is alone."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._freed = threading.Condition()

    @contextmanager
    def held(self, amount: int) -> Iterator[None]:
        with self._freed:
            self._freed.wait_for(lambda: not self._held or self._held + amount <= self._most)
            self._held += amount
        try:
            yield
        finally:
            with self._freed:
                self._held -= amount
                self._freed.notify_all()


class _StoppedError(Exception):
    """Another worker failed: this one's work is not wanted any more."""


class _Crew:
    """Workers on one queue of jobs; the first failure stops them all."""

    def __init__(self, jobs: deque[Job], target: Target, device: str) -> None:
        self._jobs, self._target, self._device = jobs, target, device
        self._budget = _Budget(_MEMORY)
        self._stop = threading.Event()

    def run(self, workers: int) -> None:
        """Do every job. Raises what the first failing one raised."""
        count = max(1, min(workers, len(self._jobs)))
        with ThreadPoolExecutor(count, "hubtool") as pool:
            try:
                for future in as_completed([pool.submit(self._work) for _ in range(count)]):
                    future.result()
            finally:
                self._stop.set()  # also after an interrupt: nobody may write once the part is closed

    def _work(self) -> None:
        import torch

        torch.set_num_threads(1)  # counts for the calling thread: one module per worker beats many threads per module
        try:
            with torch.no_grad(), _stream(self._device), Sources() as files:
                bench = Bench(files, self._device)
                while self._jobs and not self._stop.is_set():
                    job = self._next()
                    with self._budget.held(job.memory):
                        self._do(job, bench)
        except _StoppedError:
            return
        except BaseException:
            self._stop.set()
            raise

    def _next(self) -> Job:
        with suppress(IndexError):  # another worker took the last one
            return self._jobs.popleft()
        return Job((), False, 0)

    def _do(self, job: Job, bench: Bench) -> None:
        if job.copies:
            self._copy(job, bench)
            return
        context = Context(self._device)
        for placed in job.tensors:
            try:
                self._compute(placed, bench, context)
            except BadValues as error:
                raise BadValues(f"{placed.name}: {error.message}", path=error.path, hint=error.hint) from None

    def _compute(self, placed: Placed, bench: Bench, context: Context) -> None:
        written = 0
        for offset, view in _computed(placed.expr, bench, context):
            if self._stop.is_set():
                raise _StoppedError
            self._target.write(view, placed.offset + offset)
            written += len(view)
        if written != size(placed.expr):
            raise ShapeMismatch(f"{placed.name!r} has {written} bytes where {size(placed.expr)} were promised")

    def _copy(self, job: Job, bench: Bench) -> None:
        stream = (piece for placed in job.tensors for piece in pieces(placed.expr, bench.sources))
        offset = job.tensors[0].offset
        buffer = Buffer(self._target, bench.sources, bench.raw(-2, BUFFER)[1], offset)
        for piece in coalesce(stream):
            if self._stop.is_set():
                raise _StoppedError
            if isinstance(piece, Range) and len(piece) >= BUFFER:
                buffer.flush()
                if self._target.copy(bench.sources.fd(piece.path), piece, buffer.end):
                    buffer.skip(len(piece))
                    continue
            buffer.take(piece)
        buffer.flush()
        if buffer.end != offset + job.weight:
            raise ShapeMismatch(f"{job.tensors[0].name!r} and its neighbours have other sizes than promised")


def _computed(expr: Expr, bench: Bench, context: Context) -> Iterator[tuple[int, bytes | memoryview]]:
    """The bytes of an expression in pieces: offset, bytes; a view is valid until the next one is asked for."""
    match expr:
        case Compute() if tiled(expr):
            yield from tiles(expr, bench)
        case Reshape(source=source):
            yield from _computed(source, bench, context)
        case Concat(parts=parts, axis=axis) if numel(parts[0].shape[:axis]) == 1:
            start = 0
            for part in parts:
                yield from ((start + offset, data) for offset, data in _computed(part, bench, context))
                start += size(part)
        case _ if is_bytes(expr):
            offset = 0
            for data in chunks(expr, bench.sources):
                yield offset, data
                offset += len(data)
        case _ if numel(expr.shape):
            yield 0, _view(compute(expr, context))


def _view(tensor: Any) -> memoryview:
    """The tensor's bytes without a copy, where it lies in one piece in host memory."""
    import ctypes

    flat = tensor.detach().cpu().contiguous()
    data = (ctypes.c_char * (flat.numel() * flat.element_size())).from_address(flat.data_ptr())
    data.tensor = flat  # the memory lives as long as its view
    return memoryview(data).cast("B")


def _stream(device: str) -> AbstractContextManager[Any]:
    """A stream of its own for each worker: one computes while another's tiles travel."""
    import torch

    return torch.cuda.stream(torch.cuda.Stream(device)) if device.startswith("cuda") else nullcontext()


@contextmanager
def _unchanged(placed: Iterable[Placed]) -> Iterator[None]:
    """Raise ``CorruptFile`` when an input is another file at the end than at the beginning."""
    paths = sorted({ref.path for one in placed for ref in sources(one.expr) if ref.inline is None})
    with Sources() as guard:
        for path in paths:
            guard.fd(path)
        yield
        for path in paths:
            guard.fd(path)


def _keep_freed_memory() -> None:
    """Let glibc use freed temporaries again instead of giving them back after each tile: page faults were half of the system's time."""
    import ctypes

    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # not in musl or on macOS
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT // 2)


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Workers set one intra-op thread each, which torch remembers for threads to come; afterwards that is as before."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
