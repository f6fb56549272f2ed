"""What a method is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from hubtool.errors import UsageProblem
from hubtool.training.bases.base import Base
from hubtool.training.config import Config
from hubtool.training.parts.base import Part

ALL = frozenset({"denoiser", "text", "tokens"})


def everything(config: Config, step: int) -> frozenset[str]:
    """All groups move at all steps."""
    return ALL


def _nothing(config: Config) -> None:
    """No check beyond the schema."""


@dataclass(frozen=True, slots=True)
class Method:
    """``parts``: make what is trained, one after the other, in a pipeline whose own parameters are frozen. ``moving``: the groups that step moves.

    ``trains``: the groups there can be; ``full``: whether ``adapter.full`` means something.
    """

    name: str
    summary: str
    families: Collection[str]
    parts: Sequence[Callable[[Base, Config], Part]]
    trains: Collection[str] = ("denoiser", "text")
    moving: Callable[[Config, int], frozenset[str]] = everything
    check: Callable[[Config], None] = _nothing
    full: bool = False


def need_prior(config: Config) -> None:
    """Raise ``UsageProblem`` unless class images are given or can be made."""
    if not config.data.class_folder and not config.data.class_prompt:
        raise UsageProblem(
            f"{config.method} preserves its prior with images of the class",
            hint='--set data.class_prompt="a photo of a dog" --set data.class_images=200, or data.class_folder',
        )
