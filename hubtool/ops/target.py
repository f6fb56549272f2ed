"""What can be asked of a conversion, and the words it is asked in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

SUFFIXES = MappingProxyType(
    {".safetensors": "safetensors", ".ckpt": "torch-zip", ".pt": "torch-zip", ".pth": "torch-zip", ".bin": "torch-zip"}
)
DTYPES = MappingProxyType(
    {
        "fp16": "F16",
        "bf16": "BF16",
        "fp32": "F32",
        "f16": "F16",
        "f32": "F32",
        "float16": "F16",
        "float32": "F32",
        "bfloat16": "BF16",
    }
)
ALGORITHMS = ("lora", "locon")
ORIGIN = "origin"  # the layout that the file's receipt remembers


@dataclass(frozen=True, slots=True)
class Target:
    """What was asked; None keeps the source's.

    ``format``: ``safetensors`` or ``torch-zip``; ``layout``: a layout, an embedding encoding, or ``origin``; ``algorithm``: ``lora`` or
    ``locon``, what modules are rewritten as where that is exact; ``repair``: mend keys that were broken by hand first; ``config_from``: a diffusers folder whose
    configs and tokenizers complete a new one.
    """

    format: str | None = None
    layout: str | None = None
    dtype: str | None = None
    family: str | None = None
    component: str | None = None
    algorithm: str | None = None
    repair: bool = False
    config_from: Path | None = None
