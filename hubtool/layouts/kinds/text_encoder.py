"""Text encoders (CLIP, OpenCLIP, T5, language models used as encoders) and CLIP image encoders. Sentinels in ``schemas/components.toml``."""

from __future__ import annotations

from hubtool.adapters.identity import Identity
from hubtool.formats.base import TensorFile
from hubtool.layouts.kinds._common import by_table

ORDER = 65


def recognise(file: TensorFile) -> Identity | None:
    """A text encoder, or else an image encoder, by the table's first fitting row."""
    return by_table(file, "text_encoder") or by_table(file, "image_encoder")
