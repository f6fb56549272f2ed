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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubtool.errors import BadValues, FileError, ShapeMismatch
from hubtool.tensors import header as headers
from hubtool.tensors.atomic import PAGE, Output, atomic_file
from hubtool.tensors.dtypes import numel
from hubtool.tensors.evaluate import Context, Piece, Range, chunks, coalesce, compute, is_bytes, joints, pieces
from hubtool.tensors.expr import Compute, Concat, Expr, Joint, Reshape, inner, size, sources
from hubtool.tensors.reading import Sources, pread_into
from hubtool.tensors.tiles import Bench, tiled, tiles
from hubtool.tensors.writer import head

Progress = Callable[[int], None]
_RUN = 32 << 20  # bytes that one job copies
_BUFFER = 2 << 20
_MEMORY = (
    256 << 20
)  # bytes that whole-tensor computations under way may take together; a larger one runs without others


@dataclass(frozen=True, slots=True)
class _Placed:
    """A tensor and the offset of its bytes in the output."""

    name: str
    expr: Expr
    offset: int


@dataclass(frozen=True, slots=True)
class _Job:
    """Tensors one worker writes: neighbours that are copied, or what shares computations. ``memory``: bytes it needs at once."""

    tensors: tuple[_Placed, ...]
    copies: bool
    memory: int

    @property
    def weight(self) -> int:
        return sum(size(placed.expr) for placed in self.tensors)


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
        crew = _Crew(_jobs(placed), _Target(output, progress), device)
        with _unchanged(placed), _single_threaded():
            crew.run(workers or len(os.sched_getaffinity(0)))
        if late is not None:
            _replace_header(output.fd, header, late(header), path)
        headers.read(output.fd, total, path)
    return total


def _replace_header(fd: int, before: bytes, after: bytes, path: Path) -> None:
    if len(after) != len(before) or os.pwrite(fd, after, 8) != len(after):
        raise FileError("the header could not be completed", path=path)


def _placed(order: Iterable[str], tensors: Mapping[str, Expr], start: int) -> Iterator[_Placed]:
    for name in order:
        yield _Placed(name, tensors[name], start)
        start += size(tensors[name])


def _jobs(placed: Sequence[_Placed]) -> deque[_Job]:
    """Every job, those of most bytes first: what is left for the end is small, and the workers end together."""
    copied = [one for one in placed if is_bytes(one.expr)]
    jobs = [_Job(run, True, 0) for run in _runs(copied)]
    jobs += [_Job(group, False, _memory(group)) for group in _groups([one for one in placed if not is_bytes(one.expr)])]
    return deque(sorted(jobs, key=lambda job: (-job.weight, job.tensors[0].offset)))


def _runs(placed: Iterable[_Placed]) -> Iterator[tuple[_Placed, ...]]:
    """Neighbours in the output, up to some bytes together."""
    run: list[_Placed] = []
    held = 0
    for one in placed:
        if run and (held >= _RUN or run[-1].offset + size(run[-1].expr) != one.offset):
            yield tuple(run)
            run, held = [], 0
        run.append(one)
        held += size(one.expr)
    if run:
        yield tuple(run)


def _groups(placed: Iterable[_Placed]) -> Iterator[tuple[_Placed, ...]]:
    """Tensors that need the same ``Joint``, directly or through others, come together."""
    groups: dict[int, tuple[list[_Placed], set[Joint]]] = {}
    by_joint: dict[Joint, int] = {}
    for index, one in enumerate(placed):
        needed = set(joints(one.expr))
        members = [one]
        for other in sorted({by_joint[joint] for joint in needed if joint in by_joint}):
            others, theirs = groups.pop(other)
            members, needed = [*others, *members], needed | theirs
        groups[index] = (members, needed)
        by_joint.update(dict.fromkeys(needed, index))
    return (tuple(members) for members, _ in groups.values())


def _memory(group: Sequence[_Placed]) -> int:
    """An estimate: stored bytes and an fp32 copy of each source, the result in fp32 and a temporary of its size."""
    whole = [expr for one in group for expr in _whole(one.expr)]
    refs = {(ref.path, ref.start, ref.end): ref for expr in whole for ref in sources(expr)}
    held = sum(ref.nbytes + 4 * numel(ref.shape) for ref in refs.values())
    return held + sum(8 * numel(expr.shape) for expr in whole)


def _whole(expr: Expr) -> Iterator[Expr]:
    """The parts of an expression that are computed in one piece."""
    match expr:
        case Compute() if tiled(expr):
            yield from (source for source in expr.sources if not is_bytes(source))
        case Reshape() | Concat(axis=0):
            for part in inner(expr):
                yield from _whole(part)
        case _ if not is_bytes(expr):
            yield expr


class _Target:
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
            step = min(piece.end - at, _BUFFER - at % PAGE)
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

    def __init__(self, jobs: deque[_Job], target: _Target, device: str) -> None:
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

    def _next(self) -> _Job:
        with suppress(IndexError):  # another worker took the last one
            return self._jobs.popleft()
        return _Job((), False, 0)

    def _do(self, job: _Job, bench: Bench) -> None:
        if job.copies:
            self._copy(job, bench)
            return
        context = Context(self._device)
        for placed in job.tensors:
            try:
                self._compute(placed, bench, context)
            except BadValues as error:
                raise BadValues(f"{placed.name}: {error.message}", path=error.path, hint=error.hint) from None

    def _compute(self, placed: _Placed, bench: Bench, context: Context) -> None:
        written = 0
        for offset, view in _computed(placed.expr, bench, context):
            if self._stop.is_set():
                raise _StoppedError
            self._target.write(view, placed.offset + offset)
            written += len(view)
        if written != size(placed.expr):
            raise ShapeMismatch(f"{placed.name!r} has {written} bytes where {size(placed.expr)} were promised")

    def _copy(self, job: _Job, bench: Bench) -> None:
        stream = (piece for placed in job.tensors for piece in pieces(placed.expr, bench.sources))
        offset = job.tensors[0].offset
        buffer = _Buffer(self._target, bench, offset)
        for piece in coalesce(stream):
            if self._stop.is_set():
                raise _StoppedError
            if isinstance(piece, Range) and len(piece) >= _BUFFER:
                buffer.flush()
                if self._target.copy(bench.sources.fd(piece.path), piece, buffer.end):
                    buffer.skip(len(piece))
                    continue
            buffer.take(piece)
        buffer.flush()
        if buffer.end != offset + job.weight:
            raise ShapeMismatch(f"{job.tensors[0].name!r} and its neighbours have other sizes than promised")


class _Buffer:
    """Gathers pieces that follow each other in the output, so that a thousand small tensors are one write."""

    def __init__(self, target: _Target, bench: Bench, start: int) -> None:
        self._target, self._sources = target, bench.sources
        _, self._view = bench.raw(-2, _BUFFER)
        self._start, self._held = start, 0

    @property
    def end(self) -> int:
        """Offset in the output of the next byte."""
        return self._start + self._held

    def take(self, piece: Piece) -> None:
        at = 0
        while at < len(piece):
            count = min(len(piece) - at, _BUFFER - self._held)
            view = self._view[self._held : self._held + count]
            if isinstance(piece, bytes):
                view[:] = piece[at : at + count]
            else:
                pread_into(self._sources.fd(piece.path), view, piece.start + at, piece.path)
            self._held, at = self._held + count, at + count
            if self._held == _BUFFER:
                self.flush()

    def flush(self) -> None:
        self._target.write(self._view[: self._held], self._start)
        self._start, self._held = self.end, 0

    def skip(self, count: int) -> None:
        """Go on behind bytes that somebody else wrote."""
        self._start += count


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
def _unchanged(placed: Iterable[_Placed]) -> Iterator[None]:
    """Raise ``CorruptFile`` when an input is another file at the end than at the beginning."""
    paths = sorted({ref.path for one in placed for ref in sources(one.expr) if ref.inline is None})
    with Sources() as guard:
        for path in paths:
            guard.fd(path)
        yield
        for path in paths:
            guard.fd(path)


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Workers set one intra-op thread each, which torch remembers for threads to come; afterwards that is as before."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
