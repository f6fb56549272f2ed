"""What the tests of pulling share: small files, noise, and a client that does not wait."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubtool.actions.pull import pull
from hubtool.actions.pull_result import Options, Pulled
from hubtool.hub.client import Client
from tests.support.files import floats, safetensors_bytes

if TYPE_CHECKING:
    from tests.support.hub import LocalHub

MODULE = "lora_unet_down_blocks_0_attentions_0_proj_in"
CONTENT = r"/get/|/xorb/"  # where the storage serves bytes: plain files, and xet's chunks
CARD = """---
base_model: stabilityai/stable-diffusion-xl-base-1.0
license: openrail++
instance_prompt: "sks dog, oil painting"
tags: [lora, diffusers]
---
# A dog
"""


def lora(seed: float = 0, width: int = 8) -> bytes:
    shapes = {f"{MODULE}.lora_down.weight": (4, width), f"{MODULE}.lora_up.weight": (width, 4)}
    return safetensors_bytes({name: floats(*shape, start=seed) for name, shape in shapes.items()})


def noise(size: int, seed: int = 1) -> bytes:
    """Bytes that no chunk store finds twice."""
    return b"".join(hashlib.sha256(b"%d %d" % (seed, at)).digest() for at in range(size // 32 + 1))[:size]


def quick(hub: LocalHub) -> Client:
    """A client that does not wait between tries."""
    return Client(hub.url, sleep=lambda _: None)


def run(hub: LocalHub, text: str, output: Path, **options: Any) -> Pulled:
    return pull([text], Options(output, **options), client=quick(hub))[0]


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]
