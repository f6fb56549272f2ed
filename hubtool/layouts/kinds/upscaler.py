"""Super-resolution networks: ESRGAN old and new, compact, SwinIR and its kin. Sentinels in ``schemas/components.toml``."""

from __future__ import annotations

from hubtool.adapters.identity import Identity
from hubtool.formats.base import TensorFile
from hubtool.layouts.kinds._common import by_table

ORDER = 70


def recognise(file: TensorFile) -> Identity | None:
    """Identity by the table's first fitting row."""
    return by_table(file, "upscaler")
