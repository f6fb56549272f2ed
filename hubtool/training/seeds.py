"""Random numbers by place, not by history: what is drawn depends on the seed and on what it is for, never on what was drawn before.

That is why a resumed run equals one that was never interrupted, and two accumulated batches equal one of twice the size.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any


def number(*place: object) -> int:
    """63 bits that depend on every part of ``place``."""
    return int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:8], "little") >> 1


def generator(*place: object) -> Any:
    """A torch generator in main memory, so that every device gets the same numbers."""
    import torch

    return torch.Generator().manual_seed(number(*place))


def dice(*place: object) -> random.Random:
    """Python's generator, for choices."""
    return random.Random(number(*place))
