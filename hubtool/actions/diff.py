"""diff: what differs between two files, in numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hubtool.actions.refs import locate
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
    library: str | None = None,
) -> Difference:
    """Compare two adapters, two checkpoints or two other files, in any containers and layouts; inputs are paths or REFs of the library.

    Raises ``UsageProblem`` for an adapter against a checkpoint, ``ConversionError`` for two families, and what opening raises.
    """
    from hubtool.ops.diff.compare import compare

    files = [open_file(locate(one, library)) for one in (first, second)]
    return compare(files[0], files[1], family, workers=workers, progress=progress)
