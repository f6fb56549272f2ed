"""Files that belong together: what must or may lie beside an artefact, named without its folder."""

from __future__ import annotations

from collections.abc import Iterable

from hubtool.formats.base import TensorFile
from hubtool.types import Finding

CODE = "companion"


def beside(file: TensorFile, names: Iterable[str]) -> tuple[str, ...]:
    """Those of ``names`` that lie in the file's folder."""
    folder = file.path.parent
    return tuple(name for name in dict.fromkeys(names) if name != file.path.name and (folder / name).is_file())


def present(names: Iterable[str], what: str) -> Finding:
    """``NAME, NAME lies beside it: WHAT``."""
    said = tuple(names)
    return Finding(CODE, "info", f"{', '.join(said)} {'lies' if len(said) == 1 else 'lie'} beside it: {what}")


def missing(name: str, what: str, *, warn: bool = False) -> Finding:
    """``NAME is not beside it: WHAT``."""
    return Finding(CODE, "warning" if warn else "info", f"{name} is not beside it: {what}")


def one_of(file: TensorFile, names: tuple[str, ...], what: str, *, warn: bool = False) -> Finding:
    """The companion by any of its names; missing under the first."""
    found = beside(file, names)
    return present(found, what) if found else missing(names[0], what, warn=warn)


def plural(count: int, noun: str) -> str:
    """``1 tensor``, ``2 tensors``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
