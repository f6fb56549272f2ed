"""T2I-Adapter, light and full, in original and diffusers names. Sentinels in ``schemas/components.toml``."""

from __future__ import annotations

from hubtool.adapters.identity import Identity
from hubtool.formats.base import TensorFile
from hubtool.layouts.kinds._common import by_table

ORDER = 34


def recognise(file: TensorFile) -> Identity | None:
    """Identity by the table's first fitting row."""
    return by_table(file, "t2i_adapter")
