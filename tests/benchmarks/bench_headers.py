"""Opening headers against ``json.loads`` of the same bytes and against the safetensors library. Run: python -m tests.benchmarks.bench_headers [FOLDER]

Prints one JSON line: files per second, and ratios to the peers, for LoRA headers (792 tensors) and one-tensor embeddings.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open

from hubtool.formats.safetensors import read_header
from tests.support.files import write_safetensors, zeros

_BLOCKS = [
    f"{side}_blocks_{block}_attentions_{layer}" for side in ("down", "up") for block in range(4) for layer in range(3)
]
_PARTS = [f"attn{i}_to_{name}" for i in (1, 2) for name in ("q", "k", "v", "out_0")] + [
    "proj_in",
    "proj_out",
    "ff_net_2",
]


def make_lora(path: Path) -> Path:
    """264 modules of SD 1.5's sizes; like the files of kohya."""
    tensors = {}
    for block in _BLOCKS:
        for part in _PARTS:
            name = f"lora_unet_{block}_transformer_blocks_0_{part}"
            tensors[f"{name}.alpha"] = zeros("F16")
            tensors[f"{name}.lora_down.weight"] = zeros("F16", 8, 320)
            tensors[f"{name}.lora_up.weight"] = zeros("F16", 640, 8)
    return write_safetensors(path, tensors, {"ss_network_module": "networks.lora", "ss_network_dim": "8"})


def raw_json(path: Path) -> object:
    """The fastest thing that checks nothing."""
    fd = os.open(path, os.O_RDONLY)
    data = os.pread(fd, 64 << 10, 0)
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        data += os.pread(fd, length + 8 - len(data), len(data))
    os.close(fd)
    return json.loads(data[8 : 8 + length])


def library(path: Path) -> object:
    """Names and metadata alone: shapes would be quadratic."""
    with safe_open(path, framework="pt") as file:
        return file.keys(), file.metadata()


def rate(read: Callable[[Path], object], paths: list[Path]) -> float:
    """Files per second, the best of nine rounds."""
    best = float("inf")
    for _ in range(9):
        start = time.perf_counter()
        for path in paths:
            read(path)
        best = min(best, time.perf_counter() - start)
    return len(paths) / best


def measure(folder: Path) -> dict[str, float]:
    loras = [make_lora(folder / f"lora{i}.safetensors") for i in range(50)]
    small = [write_safetensors(folder / f"e{i}.safetensors", {"emb_params": zeros("F32", 1, 768)}) for i in range(500)]
    result = {}
    for kind, paths in (("lora", loras), ("small", small)):
        ours = rate(read_header, paths)
        result |= {
            f"{kind}_files_per_s": round(ours),
            f"{kind}_over_json": round(ours / rate(raw_json, paths), 2),
            f"{kind}_over_library": round(ours / rate(library, paths), 2),
        }
    return result


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as made:
        print(json.dumps(measure(Path(made))))
