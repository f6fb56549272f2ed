"""Resizing and merging LoRAs as whole processes: seconds, memory, and the error against the optimum: ``python -m tests.benchmarks.bench_factor_space``.

``[FOLDER]``: where the LoRAs of SD1.5's and SDXL's attention are made (a temporary folder by default; 3 GB free). The peer is what sd-scripts'
resize_lora.py does for every module (the product, then its SVD; here the thin one), timed on every tenth module of SD1.5 and multiplied.
Prints one JSON document.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hubtool.formats import open_file
from hubtool.layouts.parse import parse_file
from tests.benchmarks.measure import alternate
from tests.support.adapters import attention, make, write

LIMITS = {"sd1_resize": 3.0, "sdxl_resize": 8.0, "sd1_merge": 3.0}  # seconds, with the import of torch
RESIZE = [sys.executable, "-m", "hubtool", "-q", "--library", "/nonexistent/none.sqlite3", "resize"]
MERGE = """
import sys
from hubtool.actions.merge import Options, merge
from hubtool.ops.factor_space.budget import Budget
from hubtool.ops.recipe import Input
merge([Input(path=path, strength=0.5) for path in sys.argv[1:3]], sys.argv[3], Options(budget=Budget(rank=32)))
"""


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        folder = Path(name)
        commands, outputs = {}, []
        for family in ("sd1", "sdxl"):
            wide = lora(folder, family, 128, 0)
            pair = [lora(folder, family, 32, seed) for seed in (1, 2)]
            small, both = folder / f"{family}-small.safetensors", folder / f"{family}-both.safetensors"
            commands[f"{family}_resize"] = [*RESIZE, wide, "--rank", "32", "-o", small]
            commands[f"{family}_merge"] = [sys.executable, "-c", MERGE, *pair, both]
            outputs += [small, both]
        runs = alternate(commands, outputs, rounds=3)
        found: dict[str, Any] = {
            key: {"seconds": round(r.seconds, 2), "anon_mb": round(r.anon / 1e6)} for key, r in runs.items()
        }
        for key, limit in LIMITS.items():
            found[key]["limit"] = limit
        run(commands["sd1_resize"])
        worst, peer = against_dense(folder / "sd1-128-0.safetensors", folder / "sd1-small.safetensors")
        found["error_against_optimum"] = worst
        found["sd1_dense_svd_seconds"] = round(peer, 1)
        found["sd1_resize_times_faster_than_dense_svd"] = round(peer / runs["sd1_resize"].seconds, 1)
        print(json.dumps(found, indent=2))


def run(command: list[Any]) -> None:
    """Once more, for the output that the last round of another command may have removed."""
    import subprocess

    Path(command[-1]).unlink(missing_ok=True)
    subprocess.run([str(word) for word in command], check=True)


def lora(folder: Path, family: str, rank: int, seed: int) -> Path:
    path = folder / f"{family}-{rank}-{seed}.safetensors"
    adapter = make(family, attention(family), ranks=(rank,), alphas=(rank / 2,), dtype="F16", seed=seed * 10_000)
    return write(adapter, path, "kohya")


def against_dense(before: Path, after: Path) -> tuple[float, float]:
    """(largest ratio of the error to that of the best rank-32 approximation, seconds of the peer's way for all modules)."""
    import torch

    torch.set_num_threads(1)
    old, new = (parse_file(open_file(path)).adapter.patches for path in (before, after))
    keys = list(old)[::10]
    worst, spent = 0.0, 0.0
    for key in keys:
        change = old[key].delta()
        start = time.perf_counter()
        values = torch.linalg.svd(change.flatten(1), full_matrices=False).S
        spent += time.perf_counter() - start
        least = float(values.double()[32:].square().sum() ** 0.5)
        worst = max(worst, float((new[key].delta() - change).double().norm()) / least)
    return round(worst, 6), spent * len(old) / len(keys)


if __name__ == "__main__":
    main()
