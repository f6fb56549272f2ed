"""diff: what differs between two files, in numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hubtool.formats import open_file
from hubtool.ops.diff.report import Difference

Progress = Callable[[int], None]


def diff(
    first: str | Path,
    second: str | Path,
    family: str | None = None,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Difference:
    """Compare two adapters, two checkpoints or two other files, in any containers and layouts.

    Raises ``UsageProblem`` for an adapter against a checkpoint, ``ConversionError`` for two families, and what opening raises.
    """
    from hubtool.ops.diff.compare import compare

    return compare(open_file(Path(first)), open_file(Path(second)), family, workers=workers, progress=progress)
