"""Training: drawn pictures become a dataset, the dataset a LoRA, which the library knows at once."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from tests.demo.stage import OUT, run, say
from tests.demo.weights import BASE


def show() -> Path:
    """Return the trained file."""
    say("Prepare a folder of pictures, one of them broken, and train a LoRA on it")
    draw(OUT / "pictures")
    data, made = OUT / "data", OUT / "run"
    run(
        "prepare",
        OUT / "pictures",
        "-o",
        data,
        "--resolution",
        "64",
        "--least",
        "32",
        "--duplicates",
        "exact",
        "--captions",
        "names",
    )
    named = ("train", "lora", "--base", BASE, "--data", data, "-o", made, "--name", "disc")
    words = (*named, "--steps", "12", "--layout", "kohya", "--set", "data.resolution=64")
    run(*words, "--dry-run")
    run(*words)
    run("ls", "disc")
    return made / "disc.safetensors"


def draw(folder: Path) -> None:
    """Six discs and a file that is no picture."""
    folder.mkdir()
    for i in range(6):
        image = Image.new("RGB", (96, 80 + 8 * i), (240, 240, 230))
        ImageDraw.Draw(image).ellipse((10 + 3 * i, 10, 60 + 3 * i, 60), fill=(200, 30 * i, 40))
        image.save(folder / f"red disc {i}.png")
    (folder / "broken.png").write_bytes(b"no picture")
