"""The receipt of a repaired file: it keeps the broken header, and mends it again when the way back is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from hubtool.errors import FileError
from hubtool.formats.base import TensorFile
from hubtool.layouts import receipt as receipts
from hubtool.layouts import repair
from hubtool.layouts.receipt import Receipt
from hubtool.tensors import header
from hubtool.tensors.dtypes import nbytes

BROKEN = "broken"
_HEAD = BROKEN + ":"


@dataclass(frozen=True, slots=True)
class Mended:
    """``receipt``: as if the origin had been spelled well. ``renames``: broken key -> good key."""

    receipt: Receipt
    renames: Mapping[str, str]


def of_broken(file: TensorFile, layout: str, families: tuple[str, ...]) -> Receipt:
    """The receipt for a file whose keys were broken; ``layout`` and ``families`` are what they are read as after the repair."""
    bare = {key: value for key, value in file.metadata.items() if key != receipts.KEY}
    receipt = receipts.of_file(replace(file, metadata=MappingProxyType(bare)), layout, families)
    return replace(receipt, layout=_HEAD + layout)


def mend(receipt: Receipt) -> Mended | None:
    """The receipt of a broken origin, repaired; None for a receipt of a healthy origin, or one that cannot be repaired any more."""
    if not receipt.layout.startswith(_HEAD) or receipt.format != "safetensors":
        return None
    try:
        document = json.loads(receipt.raw)
        sizes = (nbytes(t["dtype"], tuple(t["shape"])) for name, t in document.items() if name != header.METADATA)
        tensors = header.parse(receipt.raw, sum(sizes), Path("origin")).tensors
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, FileError):
        return None
    found = repair.propose(tensors)
    if found is None:
        return None
    good = {found.renames.get(name, name): value for name, value in document.items()}
    raw = json.dumps(good, separators=(",", ":"), ensure_ascii=False).encode()
    return Mended(replace(receipt, layout=receipt.layout.removeprefix(_HEAD), raw=raw), found.renames)
