"""Merging two SD1.5 checkpoints against cp + fsync and peers: ``python -m tests.benchmarks.bench_merge [FOLDER] [--peers]``.

Two checkpoints of SD1.5's names and shapes (fp16, 2.1 GB each) are made in FOLDER (a temporary one by default; 9 GB free). With ``--peers``,
sd-mecha is installed from PyPI beside them, and run in turn. Prints one JSON document of ratios and megabytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hubtool.layouts import vocabulary
from hubtool.layouts.checkpoint_tables import pipeline
from hubtool.layouts.checkpoints import Checkpoint, write
from hubtool.tensors.expr import Compute, Expr
from hubtool.tensors.parallel import write_safetensors_parallel
from tests.benchmarks.measure import alternate, copy_and_sync

ROUNDS = 3
OURS = [sys.executable, "-m", "hubtool", "-q", "merge"]
PEERS = ("sd-mecha==1.1.8", "fuzzywuzzy", "Levenshtein", "rapidfuzz", "networkx", "scipy")
MECHA = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import sd_mecha
a, b = (sd_mecha.model(pathlib.Path(path)) for path in sys.argv[2:4])
sd_mecha.merge(sd_mecha.weighted_sum(a, b, alpha=0.5), output=pathlib.Path(sys.argv[4]))
"""
METHODS = {
    "weighted_sum": ["--strength", "0.5"],
    "hashed": ["--strength", "0.5", "--hash-inputs"],
    "slerp": ["--method", "slerp", "--strength", "0.5"],
}


def main() -> None:
    os.environ["HUBTOOL_LIBRARY"] = os.devnull + ".none"
    folders = [one for one in sys.argv[1:] if not one.startswith("-")]
    with tempfile.TemporaryDirectory(dir=folders[0] if folders else None) as name:
        folder = Path(name)
        first, second = (checkpoint(folder / f"{i}.safetensors", i) for i in (1, 2))
        out, copy = folder / "out.safetensors", folder / "copy.safetensors"
        commands: dict[str, Any] = {"cp": copy_and_sync(first, copy)}
        commands |= {key: [*OURS, first, second, "-o", out, *options] for key, options in METHODS.items()}
        if "--peers" in sys.argv:
            commands["sd_mecha"] = [sys.executable, "-c", MECHA, installed(folder / "peers"), first, second, out]
        runs = alternate(commands, [out, copy], ROUNDS)
        report = {key: {"seconds": round(run.seconds, 2), "anon_mb": run.anon >> 20} for key, run in runs.items()}
        for peer in runs.keys() - METHODS.keys():
            report[f"weighted_sum / {peer}"] = round(runs["weighted_sum"].seconds / runs[peer].seconds, 3)  # type: ignore[assignment]
        print(json.dumps(report, indent=2))


def checkpoint(path: Path, seed: int) -> Path:
    """SD1.5's names and shapes: one model, and a small change of it for every seed."""
    models = {"unet": "sd1-unet", "vae": "sd-vae", "text_encoder": "clip-l"}
    table = pipeline("sd1")
    assert table is not None
    weights = {name: dict(_tensors(model, seed)) for name, model in models.items()}
    write_safetensors_parallel(path, write(Checkpoint("sd1", weights, {}), table, table.forms[0]).tensors)
    return path


def _tensors(model: str, seed: int) -> list[tuple[str, Expr]]:
    modules = vocabulary.model(model).items()
    rows = [(f"{module}.{name}", shape) for module, own in modules for name, shape in own.items()]
    return [
        (key, Compute(_random, (), shape, "F16", (("shape", shape), ("at", at), ("seed", seed))))
        for at, (key, shape) in enumerate(rows)
    ]


def _random(*, shape: tuple[int, ...], at: int, seed: int) -> Any:
    import torch

    shared, own = (torch.Generator().manual_seed(at + start) for start in (0, seed * 1_000_000))
    return 0.03 * torch.randn(shape, generator=shared) + 0.003 * torch.randn(shape, generator=own)


def installed(folder: Path) -> Path:
    """sd-mecha with what it needs beside torch, in a folder of its own."""
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, *PEERS],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return folder


if __name__ == "__main__":
    main()
