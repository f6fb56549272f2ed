"""Random numbers that depend on a seed and on the place of an element, and on nothing else: not on order, tiles, threads or device.

SplitMix64 (Steele, Lea, Flood 2014) of the element's index: its n-th output is a function of n.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_GAMMA, _FIRST, _SECOND = (
    value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # as signed numbers, which wrap alike


def seeded(seed: int, key: str, index: int) -> int:
    """A signed 64-bit number for one input of one tensor."""
    digest = hashlib.sha256(f"{seed}\0{key}\0{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def uniform(start: int, count: int, state: int, device: str = "cpu") -> Tensor:
    """fp32 numbers in [0, 1), multiples of 2**-24, for elements ``start`` to ``start + count``."""
    import torch

    z = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=device).mul_(_GAMMA).add_(state)
    z = z.bitwise_xor_(_shifted(z, 30)).mul_(_FIRST)
    z = z.bitwise_xor_(_shifted(z, 27)).mul_(_SECOND)
    z = z.bitwise_xor_(_shifted(z, 31))
    return _shifted(z, 40).float().mul_(2.0**-24)


def _shifted(z: Tensor, by: int) -> Tensor:
    """A logical shift to the right; torch's keeps the sign."""
    return (z >> by).bitwise_and_((1 << (64 - by)) - 1)
