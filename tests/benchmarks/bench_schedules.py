"""Schedules on a tiny SDXL, one thread, ratios within one run: ``python -m tests.benchmarks.bench_schedules``.

Six rank-4 adapters of all attention and feed-forward layers of the UNet. Prints one JSON document: constant strengths against the plain
pipeline, strengths that differ at every step against diffusers running the six, and one change of strengths against ``set_adapters``,
with the composed weights in the cache and with a cache of no bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

from hubtool.pipelines import load
from hubtool.pipelines.schedules import linear, scheduled
from tests.support import tiny

STEPS, ADAPTERS, ROUNDS = 4, 6, 7


def main() -> None:
    torch.set_num_threads(1)
    ours, plain, theirs = (tiny.build("sdxl") for _ in range(3))
    made = [adapter(ours, seed) for seed in range(ADAPTERS)]
    names = [load(theirs, one, name=f"a{i}", strength=0.2).name for i, one in enumerate(made)]
    report = constant(plain, ours, made) | stepwise(theirs, ours, made, names) | switches(theirs, ours, made, names)
    print(json.dumps({name: round(value, 3) for name, value in report.items()}, indent=2))


def adapter(pipe: Any, seed: int) -> Any:
    layers = {path for _, path, _ in tiny.modules(pipe, ["unet"]) if ".attn" in path or ".ff.net" in path}
    return tiny.make(pipe, ["unet"], only=layers, seed=seed).adapter


def constant(plain: Any, ours: Any, made: list[Any]) -> dict[str, float]:
    with scheduled(ours, [(one, 0.2) for one in made], steps=STEPS):
        times = alternate({"plain": lambda: run(plain), "ours": lambda: run(ours)})
    return {
        "plain_ms": times["plain"],
        "constant_ms": times["ours"],
        "constant_vs_plain": times["ours"] / times["plain"],
    }


def stepwise(theirs: Any, ours: Any, made: list[Any], names: list[str]) -> dict[str, float]:
    def switch(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        pipe.set_adapters(names, [0.2 - 0.05 * (step + 1)] * len(names))
        return {}

    runs = {
        "six": lambda: run(theirs),
        "set_adapters": lambda: run(theirs, callback_on_step_end=switch),
        "ours": lambda: run(ours),
    }
    found = {}
    for label, limit in (("cached", 4 << 30), ("uncached", 0)):
        with scheduled(ours, [(one, linear(0.2, 0.05)) for one in made], steps=STEPS, cache_bytes=limit):
            times = alternate(runs)
        found |= {
            f"per_step_{label}_ms": times["ours"],
            "diffusers_six_ms": times["six"],
            f"per_step_{label}_vs_diffusers_six": times["ours"] / times["six"],
            f"per_step_{label}_vs_set_adapters_each_step": times["ours"] / times["set_adapters"],
        }
    return found


def switches(theirs: Any, ours: Any, made: list[Any], names: list[str]) -> dict[str, float]:
    found = {}
    for label, limit in (("cached", 4 << 30), ("uncached", 0)):
        with scheduled(ours, [(one, linear(0.2, 0.05)) for one in made], steps=STEPS, cache_bytes=limit) as composition:
            turn = iter(range(1 << 20))
            times = alternate(
                {
                    "theirs": lambda: theirs.set_adapters(names, [0.1] * len(names)),
                    "ours": lambda: composition.at(next(turn) % STEPS),  # noqa: B023
                }
            )
        found |= {
            f"switch_{label}_ms": times["ours"],
            f"switch_{label}_vs_set_adapters": times["ours"] / times["theirs"],
        }
        found["set_adapters_ms"] = times["theirs"]
    return found


def run(pipe: Any, **how: Any) -> None:
    noise = torch.Generator().manual_seed(0)
    pipe(
        "a cat", height=64, width=64, generator=noise, output_type="latent", num_inference_steps=STEPS, **how
    )  # fmt: skip


def alternate(jobs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds of each, medians of turns taken one after another; the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(ROUNDS + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if turn:
                times[name].append((time.perf_counter() - start) * 1000)
    return {name: median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
