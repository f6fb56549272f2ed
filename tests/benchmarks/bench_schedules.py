"""Schedules on a tiny SDXL, one thread, ratios within one run: ``python -m tests.benchmarks.bench_schedules``.

Six rank-4 adapters of all attention and feed-forward layers of the UNet. Prints one JSON document: constant strengths against the plain
pipeline, strengths that differ at every step against diffusers running the six, and one change of strengths against ``set_adapters``,
with the composed weights in the cache and with a cache of no bytes; then what a schedule holds in memory beside the model, as a share of
the weights that it changes. The same once more with a UNet four times as wide (16 times the bytes), where arithmetic outweighs Python.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

from hubtool.pipelines import load
from hubtool.pipelines.schedules import linear, scheduled
from tests.support import tiny

STEPS, ADAPTERS = 4, 6
LIMITS = {"cached": 4 << 30, "uncached": 0}


def main() -> None:
    torch.set_num_threads(1)
    sizes = {"": (1, 7), "wide_": (4, 3)}
    report = {f"{name}{key}": value for name, size in sizes.items() for key, value in measured(*size).items()}
    print(json.dumps({name: round(value, 3) for name, value in report.items()}, indent=2))


def measured(width: int, rounds: int) -> dict[str, float]:
    ours, plain, theirs = (pipeline(width) for _ in range(3))
    made = [adapter(ours, seed) for seed in range(ADAPTERS)]
    names = [load(theirs, one, name=f"a{i}", strength=0.2).name for i, one in enumerate(made)]
    report = constant(plain, ours, made, rounds) | stepwise(theirs, ours, made, names, rounds)
    return report | switches(theirs, ours, made, names) | memory(ours, made)


def pipeline(width: int) -> Any:
    """A tiny SDXL whose UNet has ``width`` times as many channels."""
    pipe = tiny.build("sdxl")
    if width > 1:
        torch.manual_seed(0)
        channels = [width * count for count in pipe.unet.config.block_out_channels]
        config = {**pipe.unet.config, "block_out_channels": channels}
        pipe.unet = type(pipe.unet).from_config(config).eval()
    return pipe


def adapter(pipe: Any, seed: int) -> Any:
    layers = {path for _, path, _ in tiny.modules(pipe, ["unet"]) if ".attn" in path or ".ff.net" in path}
    return tiny.make(pipe, ["unet"], only=layers, seed=seed).adapter


def constant(plain: Any, ours: Any, made: list[Any], rounds: int) -> dict[str, float]:
    with scheduled(ours, [(one, 0.2) for one in made], steps=STEPS):
        times = alternate({"plain": lambda: run(plain), "ours": lambda: run(ours)}, rounds)
    return {
        "plain_ms": times["plain"],
        "constant_ms": times["ours"],
        "constant_vs_plain": times["ours"] / times["plain"],
    }


def stepwise(theirs: Any, ours: Any, made: list[Any], names: list[str], rounds: int) -> dict[str, float]:
    def switch(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        pipe.set_adapters(names, [0.2 - 0.05 * (step + 1)] * len(names))
        return {}

    runs = {
        "six": lambda: run(theirs),
        "set_adapters": lambda: run(theirs, callback_on_step_end=switch),
        "ours": lambda: run(ours),
    }
    found: dict[str, float] = {}
    for label, limit in LIMITS.items():
        with scheduled(ours, [(one, linear(0.2, 0.05)) for one in made], steps=STEPS, cache_bytes=limit):
            times = alternate(runs, rounds)
        found |= {
            f"per_step_{label}_ms": times["ours"],
            "diffusers_six_ms": times["six"],
            f"per_step_{label}_vs_diffusers_six": times["ours"] / times["six"],
            f"per_step_{label}_vs_set_adapters_each_step": times["ours"] / times["set_adapters"],
        }
    return found


def switches(theirs: Any, ours: Any, made: list[Any], names: list[str]) -> dict[str, float]:
    """A change of strengths, to strengths that a run before had: a first run also looks whether every sum is finite."""
    found: dict[str, float] = {}
    for label, limit in LIMITS.items():
        with scheduled(ours, [(one, linear(0.2, 0.05)) for one in made], steps=STEPS, cache_bytes=limit) as composition:
            turn = iter(range(1, 1 << 20))
            for step in (*range(STEPS), 0):
                composition.at(step)
            times = alternate(
                {
                    "theirs": lambda: theirs.set_adapters(names, [0.1] * len(names)),
                    "ours": lambda: composition.at(next(turn) % STEPS),  # noqa: B023
                },
                15,
            )
        found |= {
            f"switch_{label}_ms": times["ours"],
            f"switch_{label}_vs_set_adapters": times["ours"] / times["theirs"],
        }
        found["set_adapters_ms"] = times["theirs"]
    return found


def memory(ours: Any, made: list[Any]) -> dict[str, float]:
    """Bytes of tensors that a schedule holds after all steps, over those of the weights that it changes."""
    found, before = {}, tensor_bytes()
    changed = sum(ours.unet.get_submodule(path).weight.nbytes for _, path in made[0].patches)
    for label, limit in LIMITS.items():
        with scheduled(ours, [(one, linear(0.2, 0.05)) for one in made], steps=STEPS, cache_bytes=limit) as composition:
            for step in range(STEPS):
                composition.at(step)
            found[f"memory_{label}_vs_weights"] = (tensor_bytes() - before) / changed
    return {"weights_mb": changed / 1e6, **found}


def tensor_bytes() -> int:
    """Of all tensors alive, memory that several share counted once."""
    gc.collect()
    found: dict[int, int] = {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor):
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(found.values())


def run(pipe: Any, **how: Any) -> None:
    noise = torch.Generator().manual_seed(0)
    pipe(
        "a cat", height=64, width=64, generator=noise, output_type="latent", num_inference_steps=STEPS, **how
    )  # fmt: skip


def alternate(jobs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, medians of turns taken one after another; the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if turn:
                times[name].append((time.perf_counter() - start) * 1000)
    return {name: median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
