"""Did it survive? The change of every module, rebuilt from source and output, compared; files without modules compare by bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hubtool.adapters.ir import Adapter, Patch
from hubtool.adapters.low_rank import LowRank
from hubtool.errors import Unsupported
from hubtool.formats.base import TensorFile
from hubtool.layouts.parse import recognise
from hubtool.layouts.unwrap import unwrapped
from hubtool.tensors.evaluate import to_bytes
from hubtool.tensors.expr import Expr, Read


@dataclass(frozen=True, slots=True)
class Verdict:
    """``worst``: largest relative error ||after - before|| / ||before|| of a module's change; ``where``: that module. ``missing``: modules lost."""

    modules: int
    worst: float
    where: str | None
    missing: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "modules": self.modules,
            "worst_relative_error": self.worst,
            "module": self.where,
            "missing": list(self.missing),
        }


def compare(before: TensorFile, after: TensorFile, family: str | None = None) -> Verdict:
    """Compare two files that should hold the same. Adapters by delta-W in fp64 (kinds that need a base weight by their tensors)."""
    first, second = recognise(before, family), recognise(after, family)
    if first is None or second is None:
        return _compare_tensors(before, after)
    return _compare_adapters(first.adapter, second.adapter)


def _compare_adapters(first: Adapter, second: Adapter) -> Verdict:
    errors = {key: _error(patch, second.patches[key]) for key, patch in first.patches.items() if key in second.patches}
    worst = max(errors, key=lambda key: errors[key], default=None)
    missing = tuple(".".join(key) for key in first.patches if key not in second.patches)
    return Verdict(len(errors), errors[worst] if worst else 0.0, ".".join(worst) if worst else None, missing)


def _error(before: Patch, after: Patch) -> float:
    if not (isinstance(before, LowRank) and isinstance(after, LowRank)):
        return 0.0 if _same_tensors(before, after) else _by_change(before, after)
    if (before.dora_scale is None) != (after.dora_scale is None):
        return float("inf")
    if before.dora_scale is not None and to_bytes(before.dora_scale) != to_bytes(after.dora_scale or before.up):
        return float("inf")
    return _relative(_product(before), _product(after))


def _by_change(before: Patch, after: Patch) -> float:
    """Modules that are written in another algorithm, by the change each makes; infinite where only the base weight could tell."""
    try:
        first, second = before.delta(), after.delta()
    except Unsupported:
        return float("inf")
    return _relative(first.double().flatten(1), second.double().flatten(1))


def _same_tensors(before: Patch, after: Patch) -> bool:
    first, second = dict(before.roles()), dict(after.roles())
    return first.keys() == second.keys() and all(to_bytes(first[role]) == to_bytes(second[role]) for role in first)


def _product(patch: LowRank) -> Any:
    """scale * up @ mid @ down in fp64, as (out, in * kh * kw)."""
    import torch

    from hubtool.tensors.evaluate import compute

    up, down = compute(patch.up).double().flatten(1), compute(patch.down).double().flatten(1)
    if patch.mid is not None:
        mid = compute(patch.mid).double()
        return patch.scale * torch.einsum("mnkl,im,nj->ijkl", mid, up, down).flatten(1)
    return patch.scale * (up @ down)


def _relative(before: Any, after: Any) -> float:
    if before.shape != after.shape:
        return float("inf")
    norm = float(before.norm())
    difference = float((after - before).norm())
    return difference / norm if norm else (0.0 if difference == 0 else float("inf"))


def _compare_tensors(before: TensorFile, after: TensorFile) -> Verdict:
    first, second = (dict(_tensors(file)) for file in (before, after))
    # encodings of embeddings rename their keys: compare by position when there are as many tensors
    names = zip(first, first if set(first) <= set(second) else second, strict=False)
    errors = {
        a: 0.0 if to_bytes(first[a]) == to_bytes(second[b]) else _relative_tensor(first[a], second[b]) for a, b in names
    }
    worst = max(errors, key=lambda key: errors[key], default=None)
    missing = tuple(first)[len(errors) :]
    return Verdict(len(errors), errors[worst] if worst else 0.0, worst, missing)


def _relative_tensor(before: Expr, after: Expr) -> float:
    from hubtool.tensors.evaluate import compute

    return _relative(compute(before).double().flatten(), compute(after).double().flatten())


def _tensors(file: TensorFile) -> Iterator[tuple[str, Expr]]:
    for name, ref in unwrapped(file)[0].items():
        yield name, Read(ref)
