"""IP-Adapter: base, plus, full-face and FaceID, and the XLabs form for Flux. Sentinels in ``schemas/components.toml``."""

from __future__ import annotations

from hubtool.adapters.identity import Identity
from hubtool.formats.base import TensorFile
from hubtool.layouts.kinds._common import by_table

ORDER = 32


def recognise(file: TensorFile) -> Identity | None:
    """Identity by the table's first fitting row."""
    return by_table(file, "ip_adapter")
