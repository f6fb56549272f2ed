"""Single file -> diffusers folder and back, against cp + fsync and diffusers' own converters: ``python -m tests.benchmarks.bench_checkpoints [FOLDER]``.

A checkpoint of SD1.5's names and shapes (fp16, 2.1 GB) is made in FOLDER (a temporary one by default; 9 GB free). Prints one JSON document of
ratios and megabytes.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from hubtool.layouts import vocabulary
from hubtool.layouts.checkpoint_tables import pipeline
from hubtool.layouts.checkpoints import Checkpoint, write
from hubtool.tensors.dtypes import nbytes
from hubtool.tensors.expr import Expr, Literal
from hubtool.tensors.writer import write_safetensors
from tests.benchmarks.measure import Run, copy_and_sync, run

ROUNDS = 3
OURS = """
import sys
from pathlib import Path
from hubtool.formats import open_file
from hubtool.ops.checkpoints import plan
from hubtool.ops.target import Target
from hubtool.ops.execute import execute
from hubtool.ops.execute_folder import execute_folder
from hubtool.ops.folder_plan import FolderPlan
source, output, layout = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
made = plan(open_file(source), Target(layout=layout))
(execute_folder if isinstance(made, FolderPlan) else execute)(made, output)
"""
THEIRS = """
import os, sys
from safetensors.torch import load_file, save_file
from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
state = load_file(sys.argv[1])
blocks = {"down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
          "layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None}
parts = {"unet": convert_ldm_unet_checkpoint(dict(state), blocks), "vae": convert_ldm_vae_checkpoint(dict(state), blocks),
         "text_encoder": convert_ldm_clip_checkpoint(dict(state))}
for name, part in parts.items():
    os.makedirs(f"{sys.argv[2]}/{name}")
    save_file({key: value.contiguous() for key, value in part.items()}, f"{sys.argv[2]}/{name}/model.safetensors", {"format": "pt"})
    with open(f"{sys.argv[2]}/{name}/model.safetensors", "rb") as file:
        os.fsync(file.fileno())
"""


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        folder = Path(name)
        source = checkpoint(folder / "model.safetensors")
        copy, out, back = folder / "copy.safetensors", folder / "out", folder / "back.safetensors"
        commands: dict[str, tuple[list[str | Path], Path]] = {
            "cp": (copy_and_sync(source, copy), copy),
            "to_folder": ([sys.executable, "-c", OURS, source, out, "diffusers"], out),
            "diffusers": ([sys.executable, "-c", THEIRS, source, folder / "theirs"], folder / "theirs"),
        }
        runs = {name: measured(*command) for name, command in commands.items()}
        run([sys.executable, "-c", OURS, source, out, "diffusers"])
        runs["to_file"] = measured([sys.executable, "-c", OURS, out, back, "single-file"], back, keep=True)
        same = back.read_bytes() == source.read_bytes()
        print(json.dumps({**report(runs), "mb": round(source.stat().st_size / 1e6), "identical": same}, indent=2))


def checkpoint(path: Path) -> Path:
    """SD1.5's names and shapes in one file, every tensor of different bytes."""
    models = {"unet": "sd1-unet", "vae": "sd-vae", "text_encoder": "clip-l"}
    table = pipeline("sd1")
    assert table is not None
    weights = {name: dict(_tensors(model)) for name, model in models.items()}
    single = write(Checkpoint("sd1", weights, {}), table, table.forms[0])
    write_safetensors(path, single.tensors, {"format": "pt"})
    return path


def _tensors(model: str) -> list[tuple[str, Expr]]:
    found: list[tuple[str, Expr]] = []
    for module, own in vocabulary.model(model).items():
        for name, shape in own.items():
            size = nbytes("F16", shape)
            data = (f"{module}.{name}".encode() * (size // 8 + 1))[:size]
            found.append((f"{module}.{name}", Literal(data, "F16", shape)))
    return found


def measured(command: list[str | Path], output: Path, *, keep: bool = False) -> list[Run]:
    """Runs of one command, its output removed before each."""
    runs = []
    for _ in range(ROUNDS):
        _remove(output)
        runs.append(run(command))
    if not keep:
        _remove(output)
    return runs


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def report(runs: dict[str, list[Run]]) -> dict[str, float]:
    seconds = {name: min(one.seconds for one in own) for name, own in runs.items()}
    anon = {name: max(one.anon for one in own) for name, own in runs.items()}
    return {
        "cp_fsync_seconds": round(seconds["cp"], 2),
        "to_folder_vs_cp_fsync": round(seconds["to_folder"] / seconds["cp"], 2),
        "to_file_vs_cp_fsync": round(seconds["to_file"] / seconds["cp"], 2),
        "times_faster_than_diffusers": round(seconds["diffusers"] / seconds["to_folder"], 1),
        "anon_mb": round(max(anon["to_folder"], anon["to_file"]) / 1e6),
        "diffusers_anon_mb": round(anon["diffusers"] / 1e6),
    }


if __name__ == "__main__":
    main()
