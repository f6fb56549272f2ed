"""Merging two SD1.5 checkpoints against cp + fsync and peers: ``python -m tests.benchmarks.bench_merge [FOLDER] [--peers[=NAME]]``.

Two checkpoints of SD1.5's names and shapes (fp16, 2.1 GB each) are made in FOLDER (a temporary one by default; 9 GB free). With ``--peers``,
sd-mecha, sd-meh and mergekit are installed from PyPI beside them, and run in turn. With ``--sdxl`` the two are SDXL's (6.9 GB each,
30 GB free), for our memory. Prints one JSON document of ratios and megabytes.
"""

from __future__ import annotations

import json
import os
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
from tests.benchmarks.peers import PEERS

ROUNDS = 3
OURS = [sys.executable, "-m", "hubtool", "-q", "merge"]
MODELS = {
    "sd1": {"unet": "sd1-unet", "vae": "sd-vae", "text_encoder": "clip-l"},
    "sdxl": {"unet": "sdxl-unet", "vae": "sd-vae", "text_encoder": "clip-l", "text_encoder_2": "clip-g"},
}
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
        family = "sdxl" if "--sdxl" in sys.argv else "sd1"
        first, second = (checkpoint(folder / f"{i}.safetensors", family, i) for i in (1, 2))
        out, copy = folder / "out.safetensors", folder / "copy.safetensors"
        commands: dict[str, Any] = {"cp": copy_and_sync(first, copy)}
        commands |= {key: [*OURS, first, second, "-o", out, *options] for key, options in METHODS.items()}
        commands |= {name: PEERS[name].command(folder / name, first, second, out) for name in peers()}
        runs = alternate(commands, [out, copy], ROUNDS)
        report = {key: {"seconds": round(run.seconds, 2), "anon_mb": run.anon >> 20} for key, run in runs.items()}
        for peer in [name for name in runs if name not in METHODS]:
            report[f"weighted_sum / {peer}"] = round(runs["weighted_sum"].seconds / runs[peer].seconds, 3)  # type: ignore[assignment]
        print(json.dumps(report, indent=2))


def peers() -> list[str]:
    """Those asked for: ``--peers`` all, ``--peers=sd_meh`` one."""
    asked = [one.partition("=")[2] for one in sys.argv if one.partition("=")[0] == "--peers"]
    return list(PEERS) if "" in asked else asked


def checkpoint(path: Path, family: str, seed: int) -> Path:
    """The family's names and shapes: one model, and a small change of it for every seed."""
    table = pipeline(family)
    assert table is not None
    weights = {name: dict(_tensors(model, seed)) for name, model in MODELS[family].items()}
    write_safetensors_parallel(path, write(Checkpoint(family, weights, {}), table, table.forms[0]).tensors)
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


if __name__ == "__main__":
    main()
