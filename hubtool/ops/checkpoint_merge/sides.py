"""The inputs of a merge, each in its own container and layout, asked by canonical names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hubtool.errors import ConversionError, HubtoolError, RecognitionError, Unsupported
from hubtool.formats.base import TensorFile
from hubtool.layouts import checkpoints
from hubtool.layouts.checkpoint_names import Spot
from hubtool.layouts.checkpoint_source import Source, recognise
from hubtool.layouts.checkpoint_weights import join
from hubtool.layouts.checkpoints import Weights
from hubtool.tensors import expr as e
from hubtool.tensors.dtypes import FLOATS, numel
from hubtool.tensors.expr import Expr, Read
from hubtool.tensors.ref import TensorRef
from hubtool.types import Shape

_HEAD = "text_model."  # transformers writes CLIP's names with and without it
# what quantisers put beside a weight: its values mean nothing by themselves
_SCALES = (
    "scale_weight",
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "scale_input",
    "SCB",
    "absmax",
    "comfy_quant",
)
_MARKER = "scaled_fp8"


@dataclass(frozen=True, slots=True)
class Side:
    """One checkpoint. ``weights``: component -> canonical key -> tensor."""

    file: TensorFile
    source: Source
    weights: Weights

    @property
    def family(self) -> str:
        return self.source.pipeline.family

    def tensor(self, component: str, key: str) -> Expr | None:
        own: Mapping[str, Expr] = self.weights.get(component, {})
        found = own.get(key)
        return (
            found if found is not None else own.get(key.removeprefix(_HEAD) if key.startswith(_HEAD) else _HEAD + key)
        )

    def joined(self, component: str, spot: Spot, shape: Shape) -> Expr | None:
        """The tensor that another file stores as ``spot``, in that file's ``shape`` where only dimensions of 1 differ; None when it is not here."""
        parts = [part for key in spot.parts if (part := self.tensor(component, key)) is not None]
        if len(parts) < len(spot.parts):
            return None
        if len({part.dtype for part in parts}) > 1:
            parts = [e.Cast(part, "F32") for part in parts]
        try:
            whole = join(spot, parts)
        except ConversionError:
            return None
        return (
            e.reshape(whole, shape)
            if numel(whole.shape) == numel(shape) and _bare(whole.shape) == _bare(shape)
            else whole
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.file.path),
            "format": self.file.format,
            "family": self.family,
            "layout": self.source.form,
        }


def _bare(shape: Shape) -> Shape:
    return tuple(n for n in shape if n != 1)


def read(files: Sequence[TensorFile], family: str | None) -> list[Side]:
    """Every input taken apart, headers only. Raises ``RecognitionError`` for a file that is no checkpoint, ``ConversionError`` where families
    differ, ``Unsupported`` for quantised weights; all by name.
    """
    sources = [_recognised(file, family) for file in files]
    whole = [source.pipeline.family for source in sources if source.component is None]
    if family is None and whole:  # a VAE by itself fits several families: that of the others counts
        sources = [
            source if source.component is None else _recognised(file, whole[0])
            for file, source in zip(files, sources, strict=True)
        ]
    sides = [_side(file, source) for file, source in zip(files, sources, strict=True)]
    _refuse_families(sides)
    return sides


def _recognised(file: TensorFile, family: str | None) -> Source:
    source = recognise(file, family, any_family=True)
    if source is None:
        text = "this is no checkpoint, pipeline folder or component that hubtool knows"
        raise RecognitionError(text, path=file.path, hint=f"hubtool explain {file.path}")
    return source


def _side(file: TensorFile, source: Source) -> Side:
    _refuse_quantised(file, source.tensors)
    exprs: dict[str, Expr] = {key: Read(ref) for key, ref in source.tensors.items()}
    try:
        return Side(file, source, checkpoints.read(exprs, source.pipeline, source.slots).weights)
    except HubtoolError as error:
        error.path = error.path or str(file.path)
        raise


def _refuse_families(sides: Sequence[Side]) -> None:
    first = sides[0]
    for other in sides[1:]:
        if other.family != first.family:
            text = f"{other.file.path.name} is {other.family}, {first.file.path.name} is {first.family}: they have no common weights"
            raise ConversionError(
                text, path=other.file.path, hint="--family says what both are, where they are recognised wrongly"
            )


def _refuse_quantised(file: TensorFile, tensors: Mapping[str, TensorRef]) -> None:
    found = next(_quantised(tensors), None)
    if found is not None:
        text = f"{found[0]} is quantised ({found[1]}): its values mean nothing without their scales"
        raise Unsupported(text, path=file.path, hint="merge the weights it was made of")


def _quantised(tensors: Mapping[str, TensorRef]) -> Iterator[tuple[str, str]]:
    for key, ref in tensors.items():
        last = key.rpartition(".")[2]
        if last in _SCALES or last == _MARKER:
            yield key.rpartition(".")[0] or key, f"there is {key}"
        elif last == "weight" and len(ref.shape) > 1 and ref.dtype not in FLOATS:
            yield key, f"its values are {ref.dtype}"
