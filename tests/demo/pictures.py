"""Pictures: a grid of strengths, a picture that remembers how it was made, and weights that come back bit for bit."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

import hubtool
from hubtool.tensors.writer import write_safetensors
from tests.demo.stage import OUT, run, say
from tests.demo.weights import BASE
from tests.support.adapters import values

_PROMPT = "a cat"


def show() -> None:
    style, token = OUT / "style.safetensors", OUT / "tiny-style.safetensors"
    say(
        "Pictures with two LoRAs: a grid of strengths, a strength that changes by step, a picture made again from its recipe"
    )
    common = ("-p", _PROMPT, "--steps", "4", "--seed", "1", "--size", "64x64")
    both = style, OUT / "detail.safetensors"
    run("compare", BASE, *both, *common, "--strengths", "0,0.5,1", "-o", OUT / "grid.png")
    run("generate", BASE, style, *common, "--schedule", "style=linear:1:0.2", "-o", OUT / "late.png")
    run("generate", "--from", OUT / "late.png", "-o", OUT / "again.png")
    _same(OUT / "late.png", OUT / "again.png")
    say("The same in Python: load a LoRA and an embedding into a pipeline, and take them out again")
    pipe = _pipeline()
    write_safetensors(token, {"<tiny-style>": values((2, pipe.text_encoder.config.hidden_size), 5)}, {"format": "pt"})
    before = _shot(pipe, "before", _PROMPT)
    report = hubtool.load(pipe, style, strength=0.8, name="style")
    counts = ", ".join(f"{len(paths)} modules of the {part}" for part, paths in report.modules.items())
    print(f"loaded {report.name} at strength {report.strength}: {counts}", flush=True)
    styled = _shot(pipe, "with-lora", _PROMPT)
    report = hubtool.load(pipe, token, name="token")
    print(f"loaded tokens {', '.join(report.tokens['text_encoder'])}", flush=True)
    _shot(pipe, "with-embedding", f"{_PROMPT}, <tiny-style>")
    hubtool.unload(pipe, "style")
    hubtool.unload(pipe, "token")
    if _shot(pipe, "after", _PROMPT) != before or styled == before:
        raise SystemExit("loading or unloading did not do what it says")


def _pipeline() -> Any:
    torch.set_num_threads(1)
    pipe = hubtool.pipeline(BASE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _shot(pipe: Any, name: str, prompt: str) -> str:
    """Make a picture, print what its pixels hash to."""
    noise = torch.Generator().manual_seed(0)
    image = pipe(prompt, num_inference_steps=4, generator=noise, height=64, width=64).images[0]
    image.save(OUT / f"{name}.png")
    digest = hashlib.sha256(image.tobytes()).hexdigest()[:16]
    print(f"{OUT / name}.png  pixels {digest}", flush=True)
    return digest


def _same(first: Path, second: Path) -> None:
    from PIL import Image

    if Image.open(first).tobytes() != Image.open(second).tobytes():
        raise SystemExit(f"{second} is another picture than {first}")
