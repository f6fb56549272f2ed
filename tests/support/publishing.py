"""Small adapters to publish, made of bytes: one module of Stable Diffusion 1 in kohya's layout, and one of GPT-2 as a folder of PEFT."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tests.support.files import floats, write_safetensors

TALK = "base_model.model.transformer.h.0.attn.c_attn"
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


def talk(folder: Path, start: int) -> Path:
    """A folder of PEFT for a GPT-2 of width 16."""
    tensors = {f"{TALK}.lora_A.weight": floats(4, 16, start=start), f"{TALK}.lora_B.weight": floats(48, 4, start=start)}
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
