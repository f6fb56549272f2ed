"""The base of a collapse: a checkpoint as it lies in its file, and where in its tensors every canonical weight is found.

Nothing is cut or renamed: a change of a canonical weight becomes a change of rows of the stored tensor, so that the output has the
source's own names, order and shapes, and a fused tensor (Flux' qkv, OpenCLIP's in_proj) is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hubtool.errors import RecognitionError
from hubtool.formats.base import TensorFile
from hubtool.layouts import checkpoint_tables as tables
from hubtool.layouts import checkpoints
from hubtool.layouts.checkpoint_source import Source, recognise
from hubtool.layouts.checkpoint_weights import cut
from hubtool.layouts.checkpoints import Home
from hubtool.ops.quantised import refuse_quantised_weight
from hubtool.tensors.expr import Expr, Read, Rows
from hubtool.tensors.ref import TensorRef
from hubtool.types import Shape

Windows = tuple[tuple[int, int], ...]
_HEADS = ("", "text_model.")  # transformers writes CLIP's names with and without it


@dataclass(frozen=True, slots=True)
class Spot:
    """A canonical parameter inside a stored tensor. ``windows``: its rows there, in its own order; ``shape``: its canonical shape.

    ``transposed``: the stored matrix is the parameter turned over (then it is all of it).
    """

    key: str
    windows: Windows
    shape: Shape
    transposed: bool = False


class Base:
    """An opened checkpoint. Raises ``RecognitionError`` for a file that is none, and what recognising raises."""

    def __init__(self, file: TensorFile, family: str | None = None) -> None:
        source = recognise(file, family, any_family=True)
        if source is None:
            text = "the base is no checkpoint, pipeline folder or component that hubtool knows"
            raise RecognitionError(text, path=file.path, hint=f"hubtool explain {file.path}")
        self.file = file
        self.source: Source = source
        self.tensors: Mapping[str, TensorRef] = source.tensors

    @property
    def family(self) -> str:
        return self.source.pipeline.family

    @cached_property
    def _homes(self) -> dict[str, Home]:
        return checkpoints.homes(self.tensors, self.source.pipeline, self.source.slots)

    @cached_property
    def _places(self) -> dict[tuple[str, str], tuple[str, int]]:
        """(component, canonical key) -> (stored key, which of its parts)."""
        homes = self._homes.items()
        return {(home.component, part): (key, at) for key, home in homes for at, part in enumerate(home.spot.parts)}

    @cached_property
    def components(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(home.component for home in self._homes.values()))

    def extras(self) -> list[str]:
        """Stored tensors that belong to no component."""
        return [key for key in self.tensors if key not in self._homes]

    def find(self, component: str, path: str, parameter: str = "weight") -> Spot | None:
        """Where a module's parameter lies; None when the base does not have it. Raises ``Unsupported`` for a quantised one."""
        for name in (path, *(path.removeprefix(head) for head in _HEADS[1:]), *(head + path for head in _HEADS[1:])):
            place = self._places.get((component, f"{name}.{parameter}" if name else parameter))
            if place is not None:
                return self._spot(*place)
        return None

    def _spot(self, key: str, part: int) -> Spot:
        home, ref = self._homes[key], self.tensors[key]
        refuse_quantised_weight(self.file, self.tensors, key)
        rows = ref.shape[0] if ref.shape else 1
        match home.spot.op:
            case "rows":
                piece = self._parts(key, home)[part]
                span = (piece.start, piece.stop) if isinstance(piece, Rows) else (0, rows)
                return Spot(key, (span,), piece.shape)
            case "swap_halves" if ref.shape and rows % 2 == 0:
                return Spot(key, ((rows // 2, rows), (0, rows // 2)), ref.shape)
            case "transpose" if len(ref.shape) == 2:
                return Spot(key, ((0, ref.shape[1]),), (ref.shape[1], ref.shape[0]), True)
        return Spot(key, ((0, rows),), ref.shape)

    def _parts(self, key: str, home: Home) -> tuple[Expr, ...]:
        sizes = tables.sizes(self.family, home.component, home.spot.parts)
        weight = self.tensors.get(f"{key.removesuffix('bias')}weight", self.tensors[key])
        return cut(home.spot, Read(self.tensors[key]), sizes, weight.shape)

    def weights(self) -> Iterator[tuple[tuple[str, str], Expr]]:
        """(component, path) -> canonical weight, of every module whose weight is stored as it is."""
        for (component, name), (key, _) in self._places.items():
            path, _, parameter = name.rpartition(".")
            if parameter == "weight" and self._homes[key].spot.op in ("rename", "conv1x1"):
                yield (component, path), Read(self.tensors[key])


def document(base: Base) -> dict[str, Any]:
    """What a report says about the base."""
    return {"path": str(base.file.path), "format": base.file.format, "family": base.family, "layout": base.source.form}
