"""Checkpoints side by side: each in its own container and layout, all asked by canonical names. Only headers are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hubtool.errors import ConversionError, HubtoolError, RecognitionError, UnknownFamily
from hubtool.formats.base import TensorFile
from hubtool.layouts import checkpoints
from hubtool.layouts.checkpoint_names import Spot
from hubtool.layouts.checkpoint_source import Source, recognise
from hubtool.layouts.checkpoint_weights import join
from hubtool.layouts.checkpoints import Checkpoint
from hubtool.tensors import expr as e
from hubtool.tensors.dtypes import numel
from hubtool.tensors.expr import Expr, Read
from hubtool.types import Shape

ParameterKey = tuple[str, str]  # (component, canonical parameter): ("unet", "conv_in.weight")
_HEAD = "text_model."  # transformers writes CLIP's names with and without it


@dataclass(frozen=True, slots=True)
class Side:
    """A checkpoint that has been recognised. ``checkpoint.extras``: what belongs to no component."""

    file: TensorFile
    source: Source
    checkpoint: Checkpoint

    @property
    def family(self) -> str:
        return self.checkpoint.family

    def parameters(self) -> Iterator[tuple[ParameterKey, Expr]]:
        for component, own in self.checkpoint.weights.items():
            yield from (((component, key), tensor) for key, tensor in own.items())

    def tensor(self, component: str, key: str) -> Expr | None:
        own: Mapping[str, Expr] = self.checkpoint.weights.get(component, {})
        other = key.removeprefix(_HEAD) if key.startswith(_HEAD) else _HEAD + key
        return own.get(key, own.get(other))

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
        return e.reshape(whole, shape) if _same_but_ones(whole.shape, shape) else whole

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.file.path),
            "format": self.file.format,
            "family": self.family,
            "layout": self.source.form,
        }


def side(file: TensorFile, family: str | None = None) -> Side | None:
    """``file`` as a checkpoint; None where it is none. Raises ``UnknownFamily``, ``ConversionError``."""
    source = recognise(file, family, any_family=True)
    if source is None:
        return None
    tensors: dict[str, Expr] = {key: Read(ref) for key, ref in source.tensors.items()}
    try:
        return Side(file, source, checkpoints.read(tensors, source.pipeline, source.slots))
    except HubtoolError as error:
        error.path = error.path or str(file.path)
        raise


def sides(files: Sequence[TensorFile], family: str | None = None) -> list[Side]:
    """All checkpoints; one that could be of several families (a VAE by itself) is read as the others'.

    Raises ``RecognitionError`` for what is no checkpoint, ``UnknownFamily``, ``ConversionError`` for checkpoints of two families.
    """
    found = [_settled(file, family) for file in files]
    known = next((one.family for one in found if one is not None), family)
    every = [one or _required(file, known) for one, file in zip(found, files, strict=True)]
    whole = next((one.family for one in every if one.source.component is None), None)
    if family is None and whole is not None:
        every = [one if one.family == whole else _as_the_others(one, whole) for one in every]
    _refuse_families(every)
    return every


def _settled(file: TensorFile, family: str | None) -> Side | None:
    """None where only the other files can tell the family."""
    try:
        return _required(file, family)
    except UnknownFamily:
        if family is not None:
            raise
        return None


def _required(file: TensorFile, family: str | None) -> Side:
    found = side(file, family)
    if found is None:
        text = "this is no checkpoint, pipeline folder or component that hubtool knows"
        raise RecognitionError(text, path=file.path, hint=f"hubtool explain {file.path}")
    return found


def _as_the_others(one: Side, family: str) -> Side:
    """A component by itself as one of ``family``, where it can be that."""
    return one if one.source.component is None else _required(one.file, family)


def _refuse_families(every: Sequence[Side]) -> None:
    first = every[0]
    for other in every[1:]:
        if other.family != first.family:
            text = f"{other.file.path.name} is {other.family}, {first.file.path.name} is {first.family}: they have no common weights"
            hint = "--family says what both are, where they are recognised wrongly"
            raise ConversionError(text, path=other.file.path, hint=hint)


def _same_but_ones(first: Shape, second: Shape) -> bool:
    bare = [tuple(n for n in shape if n != 1) for shape in (first, second)]
    return numel(first) == numel(second) and bare[0] == bare[1]
