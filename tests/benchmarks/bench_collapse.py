"""Collapse of a rank-32 LoRA, against diffusers' load + fuse + save of the UNet alone: ``python -m tests.benchmarks.bench_collapse [FOLDER] [--sdxl]``.

A checkpoint of SD1.5's names and shapes (fp16, 2.1 GB; with --sdxl also SDXL's, 6.9 GB, for its memory) and a LoRA of all attention and
feed-forward layers (264 modules; 722 for SDXL's UNet) are made in FOLDER (a temporary one by default; 11 GB free, 25 GB with --sdxl).
Prints one JSON document: seconds (medians, start of Python and import of torch included), their ratio, peaks of anonymous memory.
"""

from __future__ import annotations

import array
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median

from hubtool.adapters.ir import Adapter, ModuleKey, Patch
from hubtool.adapters.low_rank import LowRank
from hubtool.formats import open_file
from hubtool.layouts import vocabulary
from hubtool.layouts.checkpoint_tables import pipeline
from hubtool.layouts.checkpoints import Checkpoint, write
from hubtool.layouts.emit import emit
from hubtool.ops.checkpoints import plan
from hubtool.ops.execute import execute
from hubtool.ops.target import Target
from hubtool.tensors.expr import Expr, Literal, Read, reshape
from hubtool.tensors.ref import TensorRef
from hubtool.tensors.writer import write_safetensors
from hubtool.types import Shape
from tests.benchmarks.measure import Run, run

ROUNDS, RANK = 3, 32
MODELS = {
    "sd1": {"unet": "sd1-unet", "vae": "sd-vae", "text_encoder": "clip-l"},
    "sdxl": {"unet": "sdxl-unet", "vae": "sd-vae", "text_encoder": "clip-l", "text_encoder_2": "clip-g"},
}
THEIRS = """
import sys, torch
from diffusers import UNet2DConditionModel
unet = UNet2DConditionModel.from_pretrained(sys.argv[1], torch_dtype=torch.float16)
unet.load_lora_adapter(sys.argv[2], prefix="unet")
unet.fuse_lora(lora_scale=0.8)
unet.unload_lora()
unet.save_pretrained(sys.argv[3])
"""


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    with tempfile.TemporaryDirectory(dir=words[0] if words else None) as name:
        report = sd1(Path(name))
        if "--sdxl" in sys.argv:
            report |= sdxl(Path(name))
        print(json.dumps(report, indent=2))


def sd1(folder: Path) -> dict[str, float]:
    base, kohya, plain = checkpoint("sd1", folder), folder / "kohya.safetensors", folder / "diffusers.safetensors"
    for path, layout in ((kohya, "kohya"), (plain, "diffusers")):
        lora("sd1", path, layout, folder)
    execute(plan(open_file(base), Target(layout="diffusers")) or missing(), folder / "folder")
    commands = {
        "hubtool": (ours(base, kohya, folder / "out.safetensors"), folder / "out.safetensors"),
        "diffusers": (
            [sys.executable, "-c", THEIRS, folder / "folder/unet", plain, folder / "theirs"],
            folder / "theirs",
        ),
    }
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for name, (command, output) in commands.items():
            os.sync()
            runs[name].append(run(command))
            shutil.rmtree(output) if output.is_dir() else output.unlink()
    seconds = {name: median(one.seconds for one in own) for name, own in runs.items()}
    return {
        "hubtool_seconds": round(seconds["hubtool"], 2),
        "diffusers_unet_seconds": round(seconds["diffusers"], 2),
        "hubtool_vs_diffusers": round(seconds["hubtool"] / seconds["diffusers"], 3),
        "hubtool_anon_mb": round(max(one.anon for one in runs["hubtool"]) / 1e6),
        "diffusers_anon_mb": round(max(one.anon for one in runs["diffusers"]) / 1e6),
    }


def sdxl(folder: Path) -> dict[str, float]:
    base, path = checkpoint("sdxl", folder), folder / "xl.safetensors"
    lora("sdxl", path, "kohya", folder)
    done = run(ours(base, path, folder / "xl-out.safetensors"))
    return {"sdxl_seconds": round(done.seconds, 2), "sdxl_anon_mb": round(done.anon / 1e6)}


def ours(base: Path, adapter: Path, output: Path) -> list[str | Path]:
    return [sys.executable, "-m", "hubtool", "-q", "collapse", base, f"{adapter}=0.8", "-o", output]


def missing() -> object:
    raise SystemExit("the checkpoint is not recognised")


def noise(folder: Path, count: int = 1 << 25) -> Path:
    """A file of fp16 numbers of normal size: every tensor is a piece of it."""
    path = folder / "noise"
    if not path.exists():
        import random

        source = random.Random(0)
        tops = bytes(0x20 | (b & 0x80) | (b & 7) for b in range(256))  # between 2^-7 and 2^-5 of either sign
        with path.open("wb") as file:
            for _ in range(count >> 20):
                raw = bytearray(source.randbytes(2 << 20))
                raw[1::2] = raw[1::2].translate(tops)
                file.write(raw)
    return path


def piece(path: Path, shape: Shape, seed: int) -> Expr:
    count, have = math.prod(shape), path.stat().st_size // 2
    start = seed * 104729 % max(have - count, 1) if count < have else 0
    if count > have:
        raise SystemExit(f"a tensor of {count} numbers")
    return Read(TensorRef("noise", "F16", shape, path, 2 * start, 2 * (start + count)))


def checkpoint(family: str, folder: Path) -> Path:
    """The family's names and shapes in its usual single file, random numbers."""
    table, path = pipeline(family), folder / f"{family}.safetensors"
    assert table is not None
    source = noise(folder, 1 << 26)
    weights = {name: dict(_tensors(model, source)) for name, model in MODELS[family].items()}
    write_safetensors(path, write(Checkpoint(family, weights, {}), table, table.forms[0]).tensors, {"format": "pt"})
    return path


def _tensors(model: str, source: Path) -> Iterator[tuple[str, Expr]]:
    parameters = ((f"{m}.{name}", shape) for m, own in vocabulary.model(model).items() for name, shape in own.items())
    for seed, (name, shape) in enumerate(parameters):
        yield name, piece(source, shape, seed)


def lora(family: str, path: Path, layout: str, folder: Path) -> None:
    """Rank-32 factors for every attention and feed-forward layer of the UNet (and of SD1's text encoder)."""
    adapter = Adapter(family, dict(_patches(family, noise(folder))))
    emission = emit(adapter, layout)
    write_safetensors(path, emission.tensors, dict(emission.metadata))


def _patches(family: str, source: Path) -> Iterator[tuple[ModuleKey, Patch]]:
    alpha = Literal(array.array("f", [RANK]).tobytes(), "F32", ())
    for component, model in MODELS[family].items():
        for seed, (module, own) in enumerate(vocabulary.model(model).items()):
            shape = own.get("weight", ())
            if _trained(component, module, own) and (component == "unet" or family == "sd1"):
                ones = (1,) * (len(shape) - 2)
                up = reshape(piece(source, (shape[0], RANK), seed), (shape[0], RANK, *ones))
                yield (
                    (component, module),
                    LowRank(up, piece(source, (RANK, *shape[1:]), seed + 1), alpha=alpha, alpha_value=RANK),
                )


def _trained(component: str, module: str, own: Mapping[str, Shape]) -> bool:
    if len(own.get("weight", ())) < 2 or component == "vae":
        return False
    if component == "unet":
        return ".attn" in module or ".ff.net" in module or module.endswith((".proj_in", ".proj_out"))
    return ".self_attn." in module or ".mlp.fc" in module


if __name__ == "__main__":
    main()
