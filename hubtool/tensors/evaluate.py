"""From expressions to bytes and tensors.

Byte path, without torch or numpy: ``Read``, ``Literal``, ``Rows``, ``Concat`` along the outermost dimension and ``Reshape`` are
pieces of files. Everything else goes through torch (``compute``), one tensor at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from typing import Literal as OneOf

from hubtool.errors import BadValues, CorruptFile, ShapeMismatch, UnsupportedFile
from hubtool.tensors.decode import decode
from hubtool.tensors.dtypes import BITS, FLOATS, TORCH_NAME, numel
from hubtool.tensors.expr import (
    Cast,
    Cols,
    Compute,
    Concat,
    Expr,
    Item,
    Joint,
    Literal,
    Permute,
    Read,
    Reshape,
    Rows,
    inner,
    size,
)  # fmt: skip
from hubtool.tensors.expr import sources as reads
from hubtool.tensors.reading import Sources, pread_into
from hubtool.tensors.ref import TensorRef

if TYPE_CHECKING:
    import torch

CHUNK = 4 << 20
_SCALARS = 1 << 16
_WORD: dict[int, OneOf["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes ``start:end`` of a file, to be copied as they are."""

    path: Path
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


Piece: TypeAlias = Range | bytes


def is_bytes(expr: Expr) -> bool:
    """Whether ``chunks`` can stream ``expr`` without torch."""
    match expr:
        case Read() | Literal():
            return True
        case Reshape(source=source):
            return is_bytes(source)
        case Rows(source=source):
            return _row_bits(source) % 8 == 0 and is_bytes(source)
        case Concat(parts=parts, axis=axis):
            return numel(parts[0].shape[:axis]) == 1 and all(map(is_bytes, parts))
        case Cast(source=source, dtype=dtype):
            return source.dtype == dtype and is_bytes(source)
    return False


def pieces(expr: Expr, sources: Sources) -> Iterator[Piece]:
    """The bytes of ``expr`` in order, as file ranges where that is possible. Adjacent ranges are not joined: see ``coalesce``."""
    match expr:
        case Read(ref=ref):
            yield _stored(ref) if ref.contiguous else _gather(ref, sources)
        case Literal(data=data):
            yield data
        case Reshape(source=source):
            yield from pieces(source, sources)
        case Cast(source=source, dtype=dtype) if source.dtype == dtype:
            yield from pieces(source, sources)
        case Rows(source=source, start=start, stop=stop) if is_bytes(expr):
            row = _row_bits(source) // 8
            yield from _window(pieces(source, sources), start * row, stop * row)
        case Concat(parts=parts, axis=axis) if numel(parts[0].shape[:axis]) == 1:
            for part in parts:
                yield from pieces(part, sources)
        case _:
            yield _torch_bytes(compute(expr))


def coalesce(stream: Iterator[Piece]) -> Iterator[Piece]:
    """Join ranges that follow one another in a file: a thousand tensors become one copy."""
    last: Piece = b""
    for piece in stream:
        if isinstance(piece, Range) and isinstance(last, Range) and (piece.path, piece.start) == (last.path, last.end):
            last = Range(last.path, last.start, piece.end)
            continue
        if len(last):
            yield last
        last = piece
    if len(last):
        yield last


def chunks(expr: Expr, sources: Sources | None = None) -> Iterator[bytes | memoryview]:
    """Stream the row-major little-endian bytes of ``expr``, at most 4 MiB at a time where they come from a file.

    A ``memoryview`` is valid until the next one is asked for. With ``sources`` given, its files stay open for the next expression.
    Raises ``CorruptFile`` where a file ends early.
    """
    if sources is None:
        with Sources() as own:
            yield from chunks(expr, own)
        return
    buffer = memoryview(bytearray(min(CHUNK, size(expr))))
    for piece in coalesce(pieces(expr, sources)):
        if isinstance(piece, bytes):
            yield piece
        else:
            yield from _stream(piece, sources, buffer)


def to_bytes(expr: Expr) -> bytes:
    """All bytes of ``expr``."""
    return b"".join(bytes(chunk) for chunk in chunks(expr))


def scalars(source: TensorRef | Expr) -> tuple[float, ...]:
    """The values of a small tensor (at most 65,536 elements) as floats, without torch. Raises ``ValueError`` for more or for complex numbers."""
    expr = Read(source) if isinstance(source, TensorRef) else source
    if numel(expr.shape) > _SCALARS:
        raise ValueError(f"{numel(expr.shape)} values are not a small tensor")
    return decode(to_bytes(expr), expr.dtype)


def load(ref: TensorRef) -> torch.Tensor:
    """The tensor as an own, writable copy in its own dtype."""
    return compute(Read(ref))


@dataclass(frozen=True, slots=True)
class Context:
    """Where and with what memory expressions are computed: torch's device, and results of ``Joint``s that more than one item needs."""

    device: str = "cpu"
    done: dict[Joint, tuple[Any, ...]] = field(default_factory=dict)


def compute(expr: Expr, context: Context | None = None) -> torch.Tensor:
    """Evaluate any expression with torch; the result has the expression's dtype and shape and lies on the context's device.

    ``Compute`` and ``Joint`` functions get float tensors as fp32 (fp64 stays), unless the function has a true attribute ``raw_dtypes``;
    see ``hubtool.tensors.tiles`` for the other attributes. Raises ``ShapeMismatch`` when a function returns another shape than it
    promised, ``BadValues`` where a function that is ``finite`` meets or makes NaN or infinity.
    """
    context = context or Context()
    if is_bytes(expr):
        return _from_bytes(expr, context.device)
    match expr:
        case Rows(source=source, start=start, stop=stop):
            return compute(source, context)[start:stop]
        case Cols(source=source, start=start, stop=stop):
            return compute(source, context)[:, start:stop]
        case Permute(source=source, order=order):
            return compute(source, context).permute(order)
        case Reshape(source=source, shape=shape):
            return compute(source, context).reshape(shape)
        case Cast(source=source, dtype=dtype):
            return compute(source, context).to(torch_dtype(dtype))
        case Concat(parts=parts, axis=axis):
            return _concatenate([compute(part, context) for part in parts], axis)
        case Compute():
            return _call(expr, context)
        case Item(joint=joint, index=index):
            return _joint(joint, context)[index]
    raise TypeError(f"not an expression: {expr!r}")


def _row_bits(source: Expr) -> int:
    return numel(source.shape[1:]) * BITS[source.dtype]


def _stored(ref: TensorRef) -> Piece:
    return ref.inline[: ref.nbytes] if ref.inline is not None else Range(ref.path, ref.start, ref.start + ref.nbytes)


def _window(stream: Iterator[Piece], start: int, stop: int) -> Iterator[Piece]:
    at = 0
    for piece in stream:
        low, high = max(start - at, 0), min(stop - at, len(piece))
        if low < high:
            yield (
                piece[low:high]
                if isinstance(piece, bytes)
                else Range(piece.path, piece.start + low, piece.start + high)
            )
        at += len(piece)


def _stream(piece: Range, sources: Sources, buffer: memoryview) -> Iterator[memoryview]:
    fd = sources.fd(piece.path)
    for at in range(piece.start, piece.end, CHUNK):
        view = buffer[: min(CHUNK, piece.end - at)]
        pread_into(fd, view, at, piece.path)
        yield view


def _storage(ref: TensorRef, sources: Sources) -> memoryview:
    if ref.inline is not None:
        return memoryview(ref.inline)
    storage = memoryview(bytearray(ref.end - ref.start))
    pread_into(sources.fd(ref.path), storage, ref.start, ref.path)
    return storage


def _gather(ref: TensorRef, sources: Sources) -> bytes:
    """Row-major bytes of a strided view: one strided slice per innermost row."""
    strides, item = ref.strides or (), BITS[ref.dtype] // 8
    if numel(ref.shape) == 0:
        return b""
    storage = _storage(ref, sources)
    elements = storage[: len(storage) // item * item].cast(_WORD[item])
    if sum((n - 1) * step for n, step in zip(ref.shape, strides, strict=True)) >= len(elements):
        raise CorruptFile(f"the view {ref.name!r} reaches outside its storage", path=ref.path, offset=ref.start)
    length, step = (ref.shape[-1], strides[-1]) if ref.shape else (1, 1)
    return b"".join(_row(elements, at, length, step) for at in _row_starts(ref.shape[:-1], strides[:-1]))


def _row(elements: memoryview, at: int, length: int, step: int) -> bytes:
    if step == 0:
        return elements[at : at + 1].tobytes() * length
    return elements[at : at + (length - 1) * step + 1 : step].tobytes()


def _row_starts(shape: tuple[int, ...], strides: tuple[int, ...]) -> Iterator[int]:
    axes = [
        range(0, n * step, step) if step else itertools.repeat(0, n) for n, step in zip(shape, strides, strict=True)
    ]
    return map(sum, itertools.product(*axes))


def torch_dtype(dtype: str) -> torch.dtype:
    """torch's dtype of a safetensors name. Raises ``UnsupportedFile`` where torch has none."""
    import torch

    found = getattr(torch, TORCH_NAME.get(dtype, ""), None)
    if found is None:
        raise UnsupportedFile(f"torch has no dtype for {dtype}")
    assert isinstance(found, torch.dtype)
    return found


def _from_bytes(expr: Expr, device: str) -> torch.Tensor:
    import torch

    dtype = torch_dtype(expr.dtype)
    if dtype.itemsize * 8 != BITS[expr.dtype]:
        raise UnsupportedFile(f"torch packs {expr.dtype}; its values are copied, never computed with")
    if numel(expr.shape) == 0:
        return torch.empty(expr.shape, dtype=dtype, device=device)
    data = bytearray(size(expr))
    at = 0
    for chunk in chunks(expr):
        data[at : at + len(chunk)] = chunk
        at += len(chunk)
    return torch.frombuffer(data, dtype=dtype).reshape(expr.shape).to(device)


def _torch_bytes(tensor: torch.Tensor) -> bytes:
    import torch

    if tensor.numel() == 0:
        return b""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    data = bytearray(flat.numel())  # filled by torch: works without numpy, one copy
    torch.frombuffer(data, dtype=torch.uint8).copy_(flat)
    return bytes(data)


def _concatenate(parts: list[Any], axis: int) -> torch.Tensor:
    import torch

    return torch.cat(parts, dim=axis)


def _call(expr: Compute, context: Context) -> torch.Tensor:
    function, arguments = expr.function, _arguments(expr, context)
    result = function(*arguments, **dict(expr.params), **_whole(function, arguments, dict(expr.params)))
    return _finished(result, expr.shape, expr.dtype, expr, arguments)


def _joint(joint: Joint, context: Context) -> tuple[Any, ...]:
    if joint not in context.done:
        arguments = _arguments(joint, context)
        results = joint.function(*arguments, **dict(joint.params))
        if len(results) != len(joint.outputs):
            raise ShapeMismatch(f"a function promised {len(joint.outputs)} tensors and returned {len(results)}")
        context.done[joint] = tuple(
            _finished(result, shape, dtype, joint, arguments)
            for result, (shape, dtype) in zip(results, joint.outputs, strict=True)
        )
    return context.done[joint]


def _arguments(call: Compute | Joint, context: Context) -> list[torch.Tensor]:
    wide = not getattr(call.function, "raw_dtypes", False)
    return [
        widened(compute(source, context), source.dtype) if wide else compute(source, context) for source in call.sources
    ]


def widened(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """What a function gets for a tensor of ``dtype``: floats as fp32, fp64 and integers as they are."""
    return tensor.float() if dtype in FLOATS and dtype != "F64" else tensor


def _whole(function: Callable[..., Any], arguments: list[torch.Tensor], params: dict[str, Any]) -> dict[str, Any]:
    """What a tiled function gets beside its sources, when the whole tensor is its only tile."""
    survey = getattr(function, "survey", None)
    extra = {"state": survey(lambda: iter((tuple(arguments),)), **params)} if survey is not None else {}
    return {**extra, "start": 0} if getattr(function, "positional", False) else extra


def _finished(result: Any, shape: tuple[int, ...], dtype: str, call: Compute | Joint, arguments: Sequence[Any]) -> Any:
    """One rounding to the promised dtype, after the promised shape was checked."""
    if tuple(result.shape) != shape:
        raise ShapeMismatch(f"a function promised {shape} and returned {tuple(result.shape)}")
    stored = result.to(torch_dtype(dtype))
    if getattr(call.function, "finite", False) and not is_finite(stored):
        raise bad_values(result, dtype, call, arguments)
    return stored


def is_finite(tensor: Any) -> bool:
    """Whether a tensor holds neither NaN nor infinity: in 16 bits by its largest exponent, else by its ends, in one pass."""
    import torch

    if not tensor.is_floating_point() or not tensor.numel():
        return True
    least = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}.get(
        tensor.dtype
    )  # the bits of infinity, and of the first NaNs
    if least is not None:
        return int((tensor.contiguous().view(torch.int16) & 0x7FFF).max()) < least
    wide = tensor.float() if tensor.itemsize == 1 else tensor
    return bool(torch.isfinite(torch.stack(torch.aminmax(wide))).all())


def bad_values(result: Any, dtype: str, call: Compute | Joint, arguments: Sequence[Any]) -> BadValues:
    """The error for a result that is not finite once it is stored as ``dtype``; it names the input at fault if one is."""
    import torch

    for source, tensor in zip(call.sources, arguments, strict=True):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            ref = next(iter(reads(source)), None)
            where = (ref.name, ref.path) if ref is not None else ("an input", None)
            return BadValues(f"{where[0]} holds NaN or infinity", path=where[1])
    low, high = (float(end) for end in torch.aminmax(result))
    return BadValues(f"values from {low:.4g} to {high:.4g} overflow {dtype}", hint="write bf16 or fp32")


def joints(expr: Expr) -> frozenset[Joint]:
    """Every ``Joint`` that the expression needs, at any depth."""
    own = frozenset((expr.joint,)) if isinstance(expr, Item) else frozenset()
    return own.union(*map(joints, inner(expr)))
