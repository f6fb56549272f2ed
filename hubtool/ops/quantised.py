"""Quantised weights: stored numbers that mean nothing without the scales beside them. Every operation on weights refuses them here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hubtool.errors import Unsupported
from hubtool.formats.base import TensorFile
from hubtool.tensors.dtypes import FLOATS
from hubtool.tensors.ref import TensorRef

# what quantisers put beside a weight: ComfyUI's scaled fp8, bitsandbytes, torchao, GPTQ
_SCALES = frozenset({
    "scale_weight", "weight_scale", "weight_scale_inv", "weight_scale_2", "scale_input", "input_scale", "scaled_fp8", "comfy_quant",
    "absmax", "quant_map", "nested_absmax", "SCB", "scales", "qweight",
})  # fmt: skip


def refuse_quantised(file: TensorFile, tensors: Mapping[str, TensorRef]) -> None:
    """Raise ``Unsupported``, naming the first weight of ``tensors`` that is quantised, and how that is seen."""
    for key, why in _found(tensors):
        raise _refusal(file, key, why)


def refuse_quantised_weight(file: TensorFile, tensors: Mapping[str, TensorRef], key: str) -> None:
    """Raise ``Unsupported`` if the weight ``key`` of ``tensors`` is quantised, whatever the others are."""
    stem, ref = key.removesuffix(".weight"), tensors[key]
    beside = next((f"{stem}.{mark}" for mark in sorted(_SCALES) if f"{stem}.{mark}" in tensors), None)
    if beside is not None:
        raise _refusal(file, key, f"there is {beside}")
    if ref.dtype not in FLOATS:
        raise _refusal(file, key, f"its values are {ref.dtype}")


def _found(tensors: Mapping[str, TensorRef]) -> Iterator[tuple[str, str]]:
    for key, ref in tensors.items():
        owner, _, last = key.rpartition(".")
        if last in _SCALES:
            yield owner or key, f"there is {key}"
        elif last == "weight" and len(ref.shape) > 1 and ref.dtype not in FLOATS:
            yield key, f"its values are {ref.dtype}"


def _refusal(file: TensorFile, key: str, why: str) -> Unsupported:
    text = f"{key} is quantised ({why}): its values mean nothing without their scales"
    return Unsupported(text, path=file.path, hint="take the weights that it was made of")
