"""Two checkpoints side by side: parameters by canonical name, whatever container and layout each of them lies in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hubtool.errors import ConversionError, RecognitionError, ShapeMismatch, UnknownFamily, Unsupported
from hubtool.formats.base import TensorFile
from hubtool.layouts import checkpoints
from hubtool.layouts.checkpoint_source import Source, recognise
from hubtool.layouts.checkpoints import Checkpoint
from hubtool.tensors import expr as e
from hubtool.tensors.dtypes import FLOATS
from hubtool.tensors.expr import Expr, Read
from hubtool.types import Shape

Pair = tuple[Expr, Expr]
ParameterKey = tuple[str, str]  # (component, canonical parameter): ("unet", "conv_in.weight")

# tensors beside a weight that its numbers have to be multiplied with (ComfyUI's scaled fp8, bitsandbytes, torchao)
_SCALES = frozenset({
    "scale_weight", "weight_scale", "weight_scale_inv", "weight_scale_2", "scale_input", "input_scale", "scaled_fp8", "comfy_quant",
    "absmax", "quant_map", "nested_absmax", "SCB", "scales", "qweight",
})  # fmt: skip


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


@dataclass(frozen=True, slots=True)
class Pairs:
    """``common``: parameter -> (base, tuned), of one shape; ``only_base`` and ``only_tuned``: parameters of one side."""

    family: str
    common: Mapping[ParameterKey, Pair]
    only_base: tuple[ParameterKey, ...]
    only_tuned: tuple[ParameterKey, ...]

    def components(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(component for component, _ in self.common))


def side(file: TensorFile, family: str | None = None) -> Side | None:
    """``file`` as a checkpoint; None where it is none. Only headers are read. Raises ``UnknownFamily``, ``ConversionError``."""
    source = recognise(file, family, any_family=True)
    if source is None:
        return None
    tensors: dict[str, Expr] = {key: Read(ref) for key, ref in source.tensors.items()}
    return Side(file, source, checkpoints.read(tensors, source.pipeline, source.slots))


def sides(base: TensorFile, tuned: TensorFile, family: str | None = None) -> tuple[Side, Side]:
    """Both checkpoints; one that could be of several families is read as the other's.

    Raises ``RecognitionError`` for what is no checkpoint, ``ConversionError`` for checkpoints of two families.
    """
    found = [_settled(file, family) for file in (base, tuned)]
    known = next((one for one in found if one is not None), None)
    first, second = (one or _required(file, known) for one, file in zip(found, (base, tuned), strict=True))
    if first.family != second.family:
        text = f"{base.path} is a checkpoint of {first.family}, {tuned.path} one of {second.family}"
        raise ConversionError(text, path=tuned.path, hint="compare checkpoints of one family, or name it with --family")
    return first, second


def _settled(file: TensorFile, family: str | None) -> Side | None:
    """None where only the other file can tell the family."""
    try:
        found = side(file, family)
    except UnknownFamily:
        if family is not None:
            raise
        return None
    if found is None:
        raise RecognitionError("this is no checkpoint", path=file.path, hint=f"hubtool explain {file.path}")
    return found


def _required(file: TensorFile, other: Side | None) -> Side:
    found = side(file, None if other is None else other.family)
    assert found is not None  # _settled has recognised it before
    return found


def refuse_quantised(side: Side) -> None:
    """Raise ``Unsupported`` for weights whose stored numbers mean nothing without scales beside them."""
    for key, ref in side.source.tensors.items():
        last = key.rpartition(".")[2]
        if last in _SCALES or (last == "weight" and len(ref.shape) > 1 and ref.dtype not in FLOATS):
            text = f"{key} says that weights are quantised: their numbers mean nothing without their scales"
            raise Unsupported(text, path=side.file.path, hint="take the checkpoint that this one was made of")


def pair(base: Side, tuned: Side) -> Pairs:
    """Parameters of both. Raises ``ShapeMismatch`` naming the parameter and both shapes, ``ConversionError`` where nothing is common."""
    before, after = dict(base.parameters()), dict(tuned.parameters())
    common = {key: _fitted(key, before[key], tensor, tuned) for key, tensor in after.items() if key in before}
    if not common:
        parts = " and ".join(", ".join(one.checkpoint.weights) or "nothing known" for one in (base, tuned))
        raise ConversionError(f"the checkpoints have no weight in common: they hold {parts}", path=tuned.file.path)
    return Pairs(
        base.family,
        common,
        tuple(key for key in before if key not in after),
        tuple(key for key in after if key not in before),
    )


def _fitted(key: ParameterKey, before: Expr, after: Expr, tuned: Side) -> Pair:
    """A 1x1 convolution and a linear layer are one matrix; anything else must have one shape."""
    if before.shape == after.shape:
        return before, after
    if same_matrix(before.shape, after.shape):
        return before, e.reshape(after, before.shape)
    text = f"{'.'.join(key)} is {list(before.shape)} in the base and {list(after.shape)} in the other"
    raise ShapeMismatch(text, path=tuned.file.path)


def same_matrix(first: Shape, second: Shape) -> bool:
    """Whether weights differ at most in being a linear layer here and a 1x1 convolution there."""
    return _squeezed(first) == _squeezed(second)


def _squeezed(shape: Shape) -> Shape:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
