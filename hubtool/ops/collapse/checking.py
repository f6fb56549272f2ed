"""Did it come out right? Some changed tensors computed again in fp64 from base and adapters, and compared with what was written."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hubtool.adapters.low_rank import LowRank
from hubtool.formats.base import TensorFile
from hubtool.layouts.unwrap import unwrapped
from hubtool.ops.collapse import Base, Report
from hubtool.ops.collapse.output import FOLDERS
from hubtool.ops.collapse.shares import Share, put, taken
from hubtool.tensors.dtypes import numel
from hubtool.tensors.evaluate import load, torch_dtype
from hubtool.tensors.ref import TensorRef


@dataclass(frozen=True, slots=True)
class Checked:
    """One tensor. ``worst``: largest difference from the fp64 formula, relative to the largest value; ``differing``: values that are not
    the formula's, rounded once."""

    key: str
    dtype: str
    values: int
    differing: int
    worst: float

    @property
    def passed(self) -> bool:
        return self.worst <= _LIMITS.get(self.dtype, _COARSE)

    def to_json(self) -> dict[str, Any]:
        return {"key": self.key, "values": self.values, "differing": self.differing, "worst_relative_error": self.worst}


@dataclass(frozen=True, slots=True)
class Verdict:
    """``copied``: untouched tensors whose bytes were compared; ``altered``: those that differ (a fault)."""

    modules: tuple[Checked, ...]
    copied: int
    altered: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.altered and all(one.passed for one in self.modules)

    def to_json(self) -> dict[str, Any]:
        return {
            "modules": [one.to_json() for one in self.modules],
            "copied": self.copied,
            "altered": list(self.altered),
            "passed": self.passed,
        }


# relative to a tensor's largest value: sums in fp32, and half a step of the dtype
_LIMITS, _COARSE = {"F64": 1e-5, "F32": 1e-5, "F16": 1e-3, "BF16": 8e-3}, 0.1


def check(base: Base, report: Report, result: TensorFile, count: int, seed: int = 0) -> Verdict:
    """Compute ``count`` changed tensors, chosen by ``seed``, again in fp64, and compare as many copied ones byte for byte."""
    written = tensors_of(result)
    chosen = _chosen(sorted(report.shares), count, seed)
    copied = _chosen(sorted(base.tensors.keys() - report.shares.keys()), count, seed)
    altered = [key for key in copied if not _same_bytes(base.tensors[key], written[key])]
    modules = [_checked(key, base.tensors[key], written[key], report.shares[key]) for key in chosen]
    return Verdict(tuple(modules), len(copied), tuple(altered))


def tensors_of(file: TensorFile) -> dict[str, TensorRef]:
    """The tensors of a written checkpoint by stored key."""
    return dict(file.tensors if file.format in FOLDERS else unwrapped(file)[0])


def _chosen(keys: Sequence[str], count: int, seed: int) -> list[str]:
    return sorted(random.Random(seed).sample(list(keys), min(count, len(keys))))


def _same_bytes(before: TensorRef, after: TensorRef) -> bool:
    import torch

    first, second = load(before), load(after)
    return first.dtype == second.dtype and torch.equal(_bits(first), _bits(second))


def _bits(tensor: Any) -> Any:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _checked(key: str, before: TensorRef, after: TensorRef, shares: Sequence[Share]) -> Checked:
    wanted, got = expected(before, shares), load(after)
    rounded = wanted.to(torch_dtype(before.dtype))
    size = float(wanted.abs().max()) or 1.0
    worst = float((got.double() - wanted).abs().max()) / size
    return Checked(key, before.dtype, got.numel(), int((got != rounded).sum()), worst)


def expected(before: TensorRef, shares: Sequence[Share]) -> Any:
    """The formula in fp64: the stored values plus strength * change of every share."""
    stored = load(before).double()
    result = stored.clone()
    for share in shares:
        weight = taken(stored, share)
        change = share.replacement().double() - weight if share.replaces else _exact(share, weight)
        if change is not None:
            strength = 1.0 if share.replaces else share.strength
            put(result, share, taken(result, share) + strength * change.reshape(weight.shape))
    return result


def _exact(share: Share, weight: Any) -> Any:
    """The change in fp64 where two factors make it; other kinds compute in fp32 whatever they are given."""
    patch = share.factors
    if patch is None:
        total = weight.clone().zero_()
        for start, stop, change in share.changes(weight.float()):
            if change is None:
                return None
            total[start:stop] = change.double().reshape(total[start:stop].shape)
        return total
    return _product(patch).reshape(share.shape)


def _product(patch: LowRank) -> Any:
    from hubtool.adapters.parts import number

    return patch.scale * (number(patch.up).double().flatten(1) @ number(patch.down).double().flatten(1))


@dataclass(frozen=True, slots=True)
class Compared:
    """Two checkpoints, value by value. ``differing``: key -> values that differ; ``worst``: the largest difference, relative to the largest
    value of its tensor (infinite where a tensor is missing or of another kind)."""

    tensors: int
    values: int
    differing: dict[str, int]
    worst: float

    @property
    def equal(self) -> bool:
        return not self.differing

    def to_json(self) -> dict[str, Any]:
        return {
            "tensors": self.tensors,
            "values": self.values,
            "differing": sum(self.differing.values()),
            "differing_by_tensor": self.differing,
            "worst_relative_error": self.worst,
            "equal": self.equal,
        }


def compare(result: TensorFile, other: TensorFile) -> Compared:
    """Count the values of ``result`` that are not those of ``other``, tensor by tensor. Names that one side lacks count whole."""
    first, second = tensors_of(result), tensors_of(other)
    pairs = {key: (first.get(key), second.get(key)) for key in {**first, **second}}
    found = {key: _difference(*pair) for key, pair in pairs.items()}
    differing = {key: count for key, (count, _) in found.items() if count}
    values = sum(numel(ref.shape) for ref in first.values())
    return Compared(len(pairs), values, differing, max((worst for _, worst in found.values()), default=0.0))


def _difference(ref: TensorRef | None, other: TensorRef | None) -> tuple[int, float]:
    """(values that differ, the largest difference relative to the largest value)."""
    import torch

    if ref is None or other is None or (other.dtype, other.shape) != (ref.dtype, ref.shape):
        shapes = [one.shape for one in (ref, other) if one is not None]
        return max(1, *map(numel, shapes)), float("inf")
    first, second = load(ref), load(other)
    unequal = (
        (_bits(first) != _bits(second)).reshape(numel(ref.shape), -1).any(1) if numel(ref.shape) else torch.empty(0)
    )
    if not bool(unequal.any()):
        return 0, 0.0
    numbers, others = first.double(), second.double()
    return int(unequal.sum()), float((numbers - others).abs().max()) / (float(others.abs().max()) or 1.0)
