"""ControlNet, Control-LoRA and ControlNet-LLLite, in LDM, diffusers and transformer forms. Sentinels in ``schemas/components.toml``."""

from __future__ import annotations

from hubtool.adapters.identity import Identity
from hubtool.formats.base import TensorFile
from hubtool.layouts.kinds._common import by_table

ORDER = 30


def recognise(file: TensorFile) -> Identity | None:
    """Identity by the table's first fitting row."""
    return by_table(file, "controlnet")
