"""Merging adapters in tests: changes in fp64 from the factors in a file, optima by full SVD, and one module merged by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hubtool.adapters.ir import ModuleKey, Patch
from hubtool.adapters.low_rank import LowRank
from hubtool.formats import open_file
from hubtool.layouts.parse import parse_file
from hubtool.ops.execute import execute
from hubtool.ops.factor_space.modules import Asked, Slot, finished, prepare
from hubtool.ops.factor_space.report import Report
from hubtool.ops.merge_adapters import Request, Source, plan
from hubtool.ops.methods import find
from hubtool.ops.plan import Plan
from hubtool.ops.strengths import Strengths
from hubtool.tensors.evaluate import compute
from tests.support import adapters, tiny

Deltas = dict[ModuleKey, Any]
SUM = find("weighted_sum")


def deltas(path: Path, family: str = "sd1") -> Deltas:
    """Every module's change by the canonical name, in fp64, from the factors as they lie in the file."""
    found = parse_file(open_file(path), family).adapter.patches
    return {key: _product(patch) for key, patch in found.items()}


def _product(patch: Any) -> Any:
    if not isinstance(patch, LowRank) or patch.mid is not None:
        return patch.delta().double().flatten(1)
    up, down = (compute(tensor).double().flatten(1) for tensor in (patch.up, patch.down))
    return patch.scale * (up @ down)


def total(*terms: tuple[float, Deltas]) -> Deltas:
    keys = dict.fromkeys(key for _, found in terms for key in found)
    return {key: sum(factor * found[key] for factor, found in terms if key in found) for key in keys}


def distance(found: Mapping[ModuleKey, Any], wanted: Mapping[ModuleKey, Any]) -> float:
    """The relative error over all modules."""
    assert set(found) == set(wanted)
    wrong = sum(float((found[key] - wanted[key]).square().sum()) for key in wanted)
    return float((wrong / sum(float(one.square().sum()) for one in wanted.values())) ** 0.5)


def best(change: Any, rank: int) -> Any:
    """The best approximation at a rank: Eckart and Young."""
    u, values, v = torch.linalg.svd(change, full_matrices=False)
    return u[:, :rank] * values[:rank] @ v[:rank]


def style(
    folder: Path, name: str, layout: str = "kohya", modules: Sequence[ModuleKey] | None = None, **options: Any
) -> Path:
    own = adapters.attention("sd1", 2) if modules is None else modules
    return adapters.write(adapters.make("sd1", own, **options), folder / f"{name}.safetensors", layout)


def merge(
    output: Path, inputs: Sequence[tuple[Path, float | Strengths]], base: Path | None = None, **request: Any
) -> tuple[Plan, Report]:
    sources = [Source(open_file(path), one if isinstance(one, Strengths) else Strengths(one)) for path, one in inputs]
    made, report = plan(sources, Request(**request), None if base is None else Source(open_file(base)))
    execute(made, output)
    return made, report


def mixed_pair(folder: Path) -> tuple[Path, Path]:
    """Two LoRAs of unlike ranks, alphas, layouts, dtypes and modules."""
    modules = adapters.attention("sd1", 3)
    first = style(folder, "a", modules=modules[:-1], ranks=(4, 8), alphas=(2.0, 8.0), dtype="F16", seed=1)
    second = style(folder, "b", "diffusers", modules[1:], ranks=(3, 5), alphas=(None, 1.0), seed=900)
    return first, second


def low_rank(shape: tuple[int, ...], rank: int, scale: float = 1.0, seed: int = 0) -> LowRank:
    out, *inner = shape
    up = adapters.values((out, rank, *(1,) * (len(inner) - 1)), seed)
    return LowRank(up, adapters.values((rank, *inner), seed + 5000), alpha_value=scale * rank)


def near(shape: tuple[int, int], rank: int, seed: int) -> LowRank:
    """Low-rank changes that point roughly the same way."""
    torch.manual_seed(seed)
    up, down = torch.randn(shape[0], rank), torch.randn(rank, shape[1])
    up[:, 0], down[0] = up[:, 0] + 3, down[0] + 3
    return LowRank(tiny.literal(up), tiny.literal(down), alpha_value=0.5 * rank)


def merged(
    found: Mapping[int, Patch],
    strengths: Sequence[float],
    rank: int | None = None,
    asked: Asked | None = None,
    **more: Any,
) -> Any:
    """The merged patch of one module."""
    asked = asked or Asked(SUM, **more)
    job = prepare(Slot(("unet", "x"), found, tuple(strengths)), asked, rank)
    if job.done is not None:
        return job.done
    return finished(job, min(rank or job.usual, job.natural), asked)
