"""A small adapter to publish: one module of Stable Diffusion 1 in kohya's layout, made of bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tests.support.files import write_safetensors

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def lora(folder: Path, name: str = "style.safetensors", seed: int = 0, metadata: dict[str, str] | None = None) -> Path:
    data = hashlib.sha256(bytes([seed])).digest()
    up, down = (bytes((data[at % 32] % 60) for at in range(size)) for size in (320 * 4 * 2, 4 * 768 * 2))
    tensors = {
        f"{STEM}.lora_down.weight": ("F16", (4, 768), down),
        f"{STEM}.lora_up.weight": ("F16", (320, 4), up),
        f"{STEM}.alpha": ("F16", (), b"\x00\x40"),
    }
    return write_safetensors(folder / name, tensors, metadata)
