"""``TensorRef``: where a tensor's bytes lie. It names, it never holds (except for values that lie in no file of their own)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hubtool.tensors.dtypes import nbytes
from hubtool.types import Shape


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A named tensor inside a file.

    ``start`` and ``end`` are absolute byte offsets in ``path`` of the *storage window* that the tensor uses. For a contiguous
    tensor (``strides is None``) the window is exactly its bytes, row-major, little-endian. Otherwise ``strides`` counts elements
    from ``start`` and the window must be gathered. ``inline`` carries the bytes of values that have no byte range in a file
    (a tensor inside a pickle's text, a PNG chunk, a deflated archive member); then ``start == 0`` and ``end == len(inline)``.
    """

    name: str
    dtype: str
    shape: Shape
    path: Path
    start: int
    end: int
    strides: tuple[int, ...] | None = None
    inline: bytes | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor once contiguous."""
        return nbytes(self.dtype, self.shape)

    @property
    def contiguous(self) -> bool:
        return self.strides is None


class _Draft:
    """The same slots without the frozen class's guards: several times faster to fill, then turned into a ``TensorRef``."""

    __slots__ = ("dtype", "end", "inline", "name", "path", "shape", "start", "strides")

    name: str
    dtype: str
    shape: Shape
    path: Path
    start: int
    end: int
    strides: tuple[int, ...] | None
    inline: bytes | None


def consecutive(rows: Iterable[tuple[str, str, tuple[Shape, int], int]], path: Path, base: int) -> dict[str, TensorRef]:
    """Contiguous tensors that follow one another from offset ``base``, by name; rows are (name, dtype, (shape, bytes), end after base).

    Equal to calling the constructor, for readers that open thousands of headers a second (hence the local names).
    """
    new, final = _Draft, TensorRef
    tensors: dict[str, TensorRef] = {}
    start = base
    for name, dtype, (shape, _), end in rows:
        draft = new()
        tensors[name] = draft  # type: ignore[assignment]
        draft.name = name
        draft.dtype = dtype
        draft.shape = shape
        draft.path = path
        draft.start = start
        draft.end = start = base + end
        draft.strides = draft.inline = None
        draft.__class__ = final  # type: ignore[assignment]
    return tensors
