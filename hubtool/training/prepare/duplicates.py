"""Pictures that are there twice: the same pixels, or nearly the same to the eye. The largest of each group stays."""

from __future__ import annotations

from collections.abc import Sequence

from hubtool.training.prepare.examine import Look


def doubles(looks: Sequence[Look], how: str, distance: int) -> dict[int, int]:
    """Index of every picture to drop -> index of the one that stays for it. ``how``: none, exact or perceptual.

    Groups are of pictures near the one that stays, never chains: a series of slowly changing pictures is not one group.
    """
    order = sorted(range(len(looks)), key=lambda at: (-_area(looks[at]), looks[at].item.caption is None, at))
    kept: list[int] = []
    dropped: dict[int, int] = {}
    for at in order:
        twin = (
            None
            if how == "none"
            else next((other for other in kept if _same(looks[at], looks[other], how, distance)), None)
        )
        if twin is None:
            kept.append(at)
        else:
            dropped[at] = twin
    return dropped


def _same(one: Look, other: Look, how: str, distance: int) -> bool:
    if one.pixels == other.pixels:
        return True
    return how == "perceptual" and (one.shape ^ other.shape).bit_count() <= distance


def _area(look: Look) -> int:
    return look.item.size[0] * look.item.size[1]
