"""extract at rank 32 from two SD1.5 checkpoints (2.1 GB each): ``python -m tests.benchmarks.bench_extract [FOLDER]``.

The tuned one is the base, 64 directions of falling strength (4 %) and noise (1 %), made in FOLDER (a temporary one by default; 5 GB free).
SVDs are timed for one module of every shape and counted: whole ones, as sd-scripts' extract_lora_from_models.py takes them, and thin ones;
errors are compared with the optimum of a fp64 SVD for a few modules.
Prints one JSON document.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from hubtool.formats import open_file
from hubtool.layouts import vocabulary
from hubtool.layouts.checkpoint_tables import pipeline
from hubtool.layouts.checkpoints import Checkpoint, write
from hubtool.ops.extract.pairing import pair
from hubtool.ops.extract.request import Request
from hubtool.ops.extract.units import Unit, sort
from hubtool.ops.factor_space.budget import Budget
from hubtool.ops.sides import side
from hubtool.tensors.evaluate import compute
from hubtool.tensors.expr import Compute, Expr
from hubtool.tensors.parallel import write_safetensors_parallel
from tests.benchmarks.measure import run

ROUNDS = 3
RANK = 32
MODELS = {"unet": "sd1-unet", "vae": "sd-vae", "text_encoder": "clip-l"}


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        folder = Path(name)
        base, tuned = (checkpoint(folder / f"{name}.safetensors", name == "tuned") for name in ("base", "tuned"))
        print(json.dumps({kind: measured(base, tuned, folder, kind) for kind in ("lora", "locon")}, indent=2))


def measured(base: Path, tuned: Path, folder: Path, kind: str) -> dict[str, Any]:
    """Times of the command and of full SVDs over the same modules."""
    out, found = folder / f"{kind}.safetensors", folder / "report.json"
    words: list[str | Path] = ["extract", base, tuned, "-o", out, "--rank", str(RANK), "--as", kind, "--force"]
    runs = [run([sys.executable, "-m", "hubtool", *words]) for _ in range(ROUNDS)]
    program = "import sys; sys.stdout = open(sys.argv.pop(1), 'w'); from hubtool.cli.main import main; main()"
    run([sys.executable, "-c", program, found, *words, "--json"])
    errors = {one["module"]: one["error"] for one in json.loads(found.read_text())["modules"]}
    first, second = side(open_file(base)), side(open_file(tuned))
    assert first is not None
    assert second is not None
    units = sort(pair(first, second), Request(kind=kind, budget=Budget(rank=RANK))).units
    full, thin = (svd(units, kind == "locon", whole) for whole in (True, False))
    seconds = sorted(one.seconds for one in runs)[ROUNDS // 2]
    ratios = [errors[unit.name] / optimum(unit) for unit in sampled(units)]
    return {
        "modules": len(units),
        "seconds": round(seconds, 2),
        "anon_mb": round(max(one.anon for one in runs) / 1e6),
        "full_svd_seconds": round(full, 1),
        "share_of_full_svd": round(seconds / full, 3),
        "share_of_thin_svd": round(seconds / thin, 3),
        "error_vs_optimum": {"worst": round(max(ratios), 5), "modules": len(ratios)},
    }


def svd(units: list[Unit], convolutions: bool, whole: bool) -> float:
    """Seconds of whole or thin SVDs over all modules, from one of every shape."""
    counts = Counter(unit.sizes for unit in units if convolutions or not unit.convolution)
    total = 0.0
    for sizes, count in counts.items():
        matrix = torch.randn(sizes)
        start = time.perf_counter()
        torch.linalg.svd(matrix, full_matrices=whole)
        total += count * (time.perf_counter() - start)
    return total


def sampled(units: list[Unit]) -> list[Unit]:
    """Modules small enough for a decomposition in fp64."""
    return [unit for unit in units if max(unit.sizes) <= 3072][::40]


def optimum(unit: Unit) -> float:
    """Relative error of the best approximation."""
    delta = (compute(unit.tuned).double() - compute(unit.base).double()).flatten(1)
    values = torch.linalg.svdvals(delta)
    return float(values[RANK:].norm() / values.norm())


def checkpoint(path: Path, tuned: bool) -> Path:
    """SD1.5's names and shapes in fp16."""
    table = pipeline("sd1")
    assert table is not None
    weights = {name: dict(_tensors(model, tuned)) for name, model in MODELS.items()}
    single = write(Checkpoint("sd1", weights, {}), table, table.forms[0])
    write_safetensors_parallel(path, single.tensors, {"format": "pt"})
    return path


def _tensors(model: str, tuned: bool) -> list[tuple[str, Expr]]:
    found: list[tuple[str, Expr]] = []
    for module, own in vocabulary.model(model).items():
        for name, shape in own.items():
            params = (("shape", shape), ("seed", len(found)), ("tuned", tuned and model != "sd-vae"))
            found.append((f"{module}.{name}", Compute(_values, (), shape, "F16", params)))
    return found


def _values(*, shape: tuple[int, ...], seed: int, tuned: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.02
    if not tuned:
        return weight
    noise = torch.randn(shape, generator=generator)
    change = noise * (0.01 * weight.norm() / noise.norm())
    if len(shape) > 1:
        left, right = (torch.randn(64, n, generator=generator) for n in (shape[0], weight[0].numel()))
        strong = (left.T * torch.arange(1, 65).pow(-0.7)) @ right
        change += (strong * (0.04 * weight.norm() / strong.norm())).reshape(shape)
    return weight + change


if __name__ == "__main__":
    main()
