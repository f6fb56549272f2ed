"""Streaming safetensors writer: a tensor at a time, ranges of files copied by the kernel, published only when whole and checked."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from hubtool.errors import ConversionError, FileError, FileMissing, ShapeMismatch
from hubtool.tensors import header as headers
from hubtool.tensors.atomic import PAGE, Output, atomic_file, atomic_folder, is_part, same_file, sweep_parts
from hubtool.tensors.evaluate import Piece, Range, coalesce, pieces
from hubtool.tensors.expr import Expr, Read, Reshape, size
from hubtool.tensors.reading import Sources, pread_exact

__all__ = [
    "Output", "atomic_file", "atomic_folder", "is_part", "rewrite_header_in_place", "same_file", "sweep_parts", "write_safetensors",
]  # fmt: skip

Progress = Callable[[int], None]
_WINDOW, _GAP, _MOST_PIECES = (
    2 << 20,
    4 << 10,
    512,
)  # one read and one gathered write: at most so far, so sparse, so many
_PHASE_FROM = 1 << 20  # bytes: below this, padding to a page costs more than it saves


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Expr],
    metadata: Mapping[str, str] | None = None,
    *,
    force: bool = False,
    header: bytes | None = None,
    phase: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Write ``tensors`` in mapping order, atomically, and return the bytes of the file.

    ``header``: exact JSON header to reuse, padding included (byte-identical restoration); it then decides the order of the data, and
    its names, dtypes and shapes must be those of ``tensors``. ``phase``: wanted offset of the data within a page of 4096 bytes; by
    default that of the file most bytes are copied from, so that the kernel copies whole pages. ``progress`` is called with the bytes
    just written. Raises ``WouldOverwrite``, ``FileError``, and whatever evaluating an expression raises; then nothing was written.
    """
    sizes = {name: size(expr) for name, expr in tensors.items()}
    header, order = _head(path, tensors, sizes, metadata, header, phase)
    total = 8 + len(header) + sum(sizes.values())
    with atomic_file(path, total, force=force) as output:
        output.write(len(header).to_bytes(8, "little") + header)
        with Sources() as sources:
            stream = (piece for name in order for piece in _whole(name, tensors[name], sizes[name], sources))
            _write(output, coalesce(stream), sources, progress)
        if pread_exact(output.fd, len(header), 8, path) != header:
            raise FileError("the header does not lie in the file as it was written", path=path)
    return total


def head(
    path: Path,
    tensors: Mapping[str, Expr],
    metadata: Mapping[str, str] | None,
    header: bytes | None = None,
    phase: int | None = None,
) -> tuple[bytes, list[str]]:
    """The header of a file of ``tensors``, without its length, and their names in the order of the data. See ``write_safetensors``."""
    sizes = {name: size(expr) for name, expr in tensors.items()}
    return _head(path, tensors, sizes, metadata, header, phase)


def _head(
    path: Path,
    tensors: Mapping[str, Expr],
    sizes: Mapping[str, int],
    metadata: Mapping[str, str] | None,
    header: bytes | None,
    phase: int | None,
) -> tuple[bytes, list[str]]:
    if header is not None:
        order = _order_of(header, tensors, sum(sizes.values()), path)
    else:
        order = list(tensors)
        entries = [(name, expr.dtype, expr.shape, sizes[name]) for name, expr in tensors.items()]
        phase = _page_phase(tensors.values(), sizes.values()) if phase is None else phase
        header = headers.serialise(entries, metadata, phase=phase)
    # our own output obeys the rules of our reader, before a byte is written
    headers.parse(header, sum(sizes.values()), path)
    return header, order


def rewrite_header_in_place(path: Path, header: bytes) -> bool:
    """Replace the JSON header of a safetensors file without moving its data; False when ``header`` does not fit the old length.

    The rest is filled with spaces. The new header is checked against the data before anything is written, then written by one
    ``pwrite`` and synced. Promise: the tensor data is never touched, and any other error leaves the old header. Not promised: a
    power cut *during* that one write may leave a mix of old and new header when it is larger than a page (4 KiB); who cannot
    accept that writes a copy instead. Raises ``CorruptFile`` when the old or the new header is wrong.
    """
    fd = _open_update(path)
    try:
        total = os.fstat(fd).st_size
        old = headers.read(fd, total, path)
        if len(header) > len(old.raw):
            return False
        padded = header.ljust(len(old.raw))
        new = headers.parse(padded, total - old.data_start, path)
        if _spans(new) != _spans(old):
            raise ConversionError("the new header cuts the data at other places", path=path)
        if os.pwrite(fd, padded, 8) != len(padded):
            raise FileError("the header was written only in part", path=path)
        os.fsync(fd)
        return True
    finally:
        os.close(fd)


def _order_of(header: bytes, tensors: Mapping[str, Expr], body: int, path: Path) -> list[str]:
    """Names in the order of the data that ``header`` describes, after checking that it describes ``tensors``."""
    parsed = headers.parse(header, body, path).tensors
    if parsed.keys() != tensors.keys():
        raise ConversionError("the header to reuse names other tensors", path=path)
    for name, ref in parsed.items():
        if (ref.dtype, ref.shape) != (tensors[name].dtype, tensors[name].shape):
            raise ShapeMismatch(f"the header to reuse says {ref.dtype} {ref.shape} for {name!r}", path=path)
    return sorted(parsed, key=lambda name: (parsed[name].start, parsed[name].end))


def _page_phase(exprs: Iterable[Expr], sizes: Iterable[int]) -> int | None:
    """Where in a page the data should start so that most copied bytes keep their place in a page; None when it does not matter."""
    wanted: Counter[int] = Counter()
    at = 0
    for expr, count in zip(exprs, sizes, strict=True):
        source = expr.source if isinstance(expr, Reshape) else expr
        if isinstance(source, Read) and source.ref.contiguous and source.ref.inline is None:
            wanted[(source.ref.start - at) % PAGE] += count
        at += count
    phase, most = wanted.most_common(1)[0] if wanted else (0, 0)
    # data at odd offsets (files from before 2023) is copied faster than it is read later: never hand that on
    return phase if most >= _PHASE_FROM and most * 2 > at and phase % 8 == 0 else None


def _whole(name: str, expr: Expr, wanted: int, sources: Sources) -> Iterator[Piece]:
    """The pieces of one tensor of ``wanted`` bytes; a wrong total would shift everything behind it."""
    left = wanted
    for piece in pieces(expr, sources):
        left -= len(piece)
        yield piece
    if left:
        raise ShapeMismatch(f"{name!r} has {wanted - left} bytes where {expr.dtype} {expr.shape} needs {wanted}")


def _write(output: Output, stream: Iterator[Piece], sources: Sources, progress: Progress | None) -> None:
    for batch in _batches(stream):
        first = batch[0]
        if not isinstance(first, Range):
            output.write(first)
        elif len(batch) == 1:
            output.copy_range(sources.fd(first.path), first.start, len(first))
        else:
            output.gather(sources.fd(first.path), [(p.start, p.end) for p in batch if isinstance(p, Range)])
        if progress is not None:
            progress(sum(map(len, batch)))


def _batches(stream: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Pieces one by one, but small ranges of one file that follow each other closely together, up to a window."""
    batch: list[Piece] = []
    for piece in stream:
        if batch and not _joins(batch, piece):
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def _joins(batch: list[Piece], piece: Piece) -> bool:
    first, last = batch[0], batch[-1]
    if not (isinstance(first, Range) and isinstance(last, Range) and isinstance(piece, Range)):
        return False
    near = piece.path == last.path and 0 <= piece.start - last.end <= _GAP
    return near and piece.end - first.start <= _WINDOW and len(batch) < _MOST_PIECES


def _spans(header: headers.Header) -> list[tuple[int, int]]:
    return sorted((ref.start, ref.end) for ref in header.tensors.values())


def _open_update(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise FileMissing("no such file", path=path) from None
    except OSError as error:
        raise FileError(f"cannot open for writing: {error.strerror}", path=path) from error
