"""Conversions against cp + fsync and against the peers, in one run: ``python -m tests.benchmarks.bench_convert [FOLDER]``.

A rank-32 SDXL LoRA (kohya, 228 MB) and a checkpoint of SD1.5's size (torch zip, 2.1 GB) are made in FOLDER (a temporary one by
default; 9 GB free). Prints one JSON document of ratios and megabytes.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.measure import alternate, copy_and_sync, interpreter
from tests.support.adapters import attention, make, values, write

HUBTOOL = [sys.executable, "-m", "hubtool", "-q", "--library", "/nonexistent/none.sqlite3", "convert"]
DIFFUSERS = """
import sys
from safetensors.torch import load_file, save_file
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers, _maybe_map_sgm_blocks_to_diffusers
from diffusers import UNet2DConditionModel
class Config: layers_per_block = 2
state = _maybe_map_sgm_blocks_to_diffusers(load_file(sys.argv[1]), Config)
state, alphas = _convert_non_diffusers_lora_to_diffusers(state)
save_file(state, sys.argv[2])
"""
TORCH = """
import sys, torch
from safetensors.torch import save_file
save_file(torch.load(sys.argv[1], weights_only=True, mmap=True), sys.argv[2])
"""


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        folder = Path(name)
        start = interpreter()
        print(
            json.dumps(
                {"interpreter_ms": round(start * 1e3), **layout(folder), **in_place(folder), **checkpoint(folder)},
                indent=2,
            )
        )


def layout(folder: Path) -> dict[str, float]:
    source, out = folder / "lora.safetensors", folder / "out.safetensors"
    write(make("sdxl", attention("sdxl"), ranks=(32,), alphas=(16.0,), dtype="F16"), source, "kohya")
    got = alternate(
        {
            "cp": copy_and_sync(source, out),
            "hubtool": [*HUBTOOL, source, "-o", out, "--layout", "diffusers"],
            "diffusers": [sys.executable, "-c", DIFFUSERS, source, out],
        },
        [out],
    )
    return {
        "layout_mb": round(source.stat().st_size / 1e6),
        "layout_vs_cp_fsync": round(got["hubtool"].seconds / got["cp"].seconds, 2),
        "layout_seconds": round(got["hubtool"].seconds, 3),
        "layout_anon_mb": round(got["hubtool"].anon / 1e6),
        "layout_times_faster_than_diffusers": round(got["diffusers"].seconds / got["hubtool"].seconds, 1),
    }


def in_place(folder: Path) -> dict[str, float]:
    """The rename itself, without the start of the interpreter."""
    from hubtool.actions.convert import Options, convert
    from hubtool.ops.target import Target

    path = folder / "names.safetensors"
    write(make("sdxl", attention("sdxl"), ranks=(32,), alphas=(16.0,), dtype="F16"), path, "kohya/diffusers")
    convert(path, None, Target(layout="kohya/sgm"), Options(dry_run=True))
    start = time.perf_counter()
    convert(path, None, Target(layout="kohya/sgm"), Options(in_place=True))
    return {"in_place_ms": round((time.perf_counter() - start) * 1e3, 1)}


def checkpoint(folder: Path) -> dict[str, float]:
    from hubtool.formats.torch_writer import write_torch_zip

    source, out = folder / "model.ckpt", folder / "out.safetensors"
    blocks = {f"block.{i}.weight": values((1280, 1280), i, "F16") for i in range(650)}
    write_torch_zip(source, blocks)
    got = alternate(
        {
            "cp": copy_and_sync(source, out),
            "hubtool": [*HUBTOOL, source, "-o", out],
            "torch": [sys.executable, "-c", TORCH, source, out],
        },
        [out],
        rounds=3,
    )
    return {
        "ckpt_mb": round(source.stat().st_size / 1e6),
        "ckpt_vs_cp_fsync": round(got["hubtool"].seconds / got["cp"].seconds, 2),
        "ckpt_anon_mb": round(got["hubtool"].anon / 1e6),
        "ckpt_times_faster_than_torch_mmap": round(got["torch"].seconds / got["hubtool"].seconds, 1),
    }


if __name__ == "__main__":
    main()
