"""Equal inputs give equal bytes: every method, whatever PYTHONHASHSEED, the number of workers and torch's own threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from hubtool.ops.methods import known  # noqa: E402

_SCRIPT = '''
"""Prints a line for every output: what it is, and the SHA-256 of its bytes."""
import hashlib, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from hubtool.cli.main import cli
from hubtool.errors import UsageProblem
from hubtool.formats import open_file
from hubtool.formats.torch_writer import write_torch_zip
from hubtool.ops.execute import execute
from hubtool.ops.factor_space.budget import Budget
from hubtool.ops.merge_adapters import Request, Source, plan
from hubtool.ops.methods import known
from hubtool.ops.strengths import Strengths
from hubtool.tensors.parallel import write_safetensors_parallel
from tests.support.checkpoints import single
from tests.support.merging import style
from tests.support.tiny import literal

folder, workers = Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir()

def told(what, path):
    print(what, hashlib.sha256(path.read_bytes()).hexdigest())

def inputs(method):
    low, high = method.inputs
    return min(max(low, 2), high or 3)

torch.manual_seed(5)
shapes = {"wide": (260, 1030), "small": (24, 5, 3, 3), "bias": (7,)}  # the first is more than one tile
base = {name: torch.randn(shape) for name, shape in shapes.items()}
others = [{name: one + 0.1 * torch.randn(one.shape) for name, one in base.items()} for _ in range(3)]
for name, method in known().items():
    count = inputs(method)
    tensors = {
        key: method.expr(
            [literal(other[key]) for other in others[:count]], weights=(0.6, 0.4, 0.3)[:count], dtype="F16",
            base=literal(base[key]) if method.base == "required" else None, key=key, seed=3,
        )
        for key in shapes
    }
    write_safetensors_parallel(folder / f"{name}.safetensors", tensors, workers=workers)
    told(f"tensors {name}", folder / f"{name}.safetensors")
    write_torch_zip(folder / f"{name}.pt", tensors, root="archive", workers=workers)
    told(f"torch {name}", folder / f"{name}.pt")

files = [style(folder, f"input{i}", ("kohya", "diffusers", "kohya/ldm")[i], ranks=(3 + i,), seed=40 * i) for i in range(3)]
for name, method in known().items():
    for space in ("dense", "core", "knots"):
        sources = [Source(open_file(file), Strengths(0.7)) for file in files[: inputs(method)]]
        out = folder / f"{name}.{space}.safetensors"
        try:
            request = Request(method=name, budget=Budget(rank=4), space=space, seed=3, workers=workers)
            execute(plan(sources, request)[0], out, workers=workers)
        except UsageProblem as error:  # not of adapters, or the same in every space
            print("adapters", name, space, error)
            continue
        told(f"adapters {name} {space}", out)

start = load_file(single("sd1", folder))
tuned = {k: v + 0.05 * torch.randn(v.shape) if v.is_floating_point() else v for k, v in start.items()}
save_file(tuned, folder / "tuned.safetensors")
for limit in (["--rank", "2"], ["--energy", "0.5"]):  # by a randomised SVD
    out = folder / f"extracted{limit[0]}.safetensors"
    files = [folder / "sd1.safetensors", folder / "tuned.safetensors"]
    cli.main(["-q", "extract", *map(str, files), *limit, "--workers", str(workers), "-o", str(out)], standalone_mode=False)
    told(f"extract {limit[0]}", out)
'''


@pytest.mark.slow
def test_every_method_gives_the_same_bytes_under_any_hash_seed_worker_count_and_thread_count(tmp_path: Path) -> None:
    said = []
    for number, (seed, workers, threads) in enumerate((("0", "1", "1"), ("4711", "4", "2"))):
        environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, tmp_path / str(number), workers],
            env=environment, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        said.append([line for line in done.stdout.splitlines() if str(tmp_path) not in line])
    assert len(said[0]) > 4 * len(known())
    different = [one for one, other in zip(*said, strict=True) if one != other]
    assert different == []


def test_the_methods_of_chance_are_among_them() -> None:
    assert {name for name, method in known().items() if method.random} >= {"dare", "dare_ties", "della", "della_linear"}
