"""What a REF means on disk: a path, or the file of an artifact named by its id, a prefix of that, or the start of a hash."""

from __future__ import annotations

import os
from pathlib import Path

from hubtool.actions.where import library_exists
from hubtool.errors import FileMissing, NotFound


def locate(ref: str | os.PathLike[str], library: str | None = None) -> Path:
    """The path itself where it exists, else where the artifact of the library lies. Raises ``FileMissing``, ``NotFound``, ``AmbiguousRef``."""
    path, text = Path(ref), os.fspath(ref)
    if os.path.lexists(path):
        return path
    if not library_exists(library) or path.name != text:
        raise FileMissing("no such file or folder", path=path)
    from hubtool.actions.library import reading
    from hubtool.registry import browse

    with reading(library) as reader:
        row = browse.find(reader, text)
    for place in row.places:
        if os.path.exists(place.path):
            return Path(place.path)
    raise NotFound(f"{text!r} is in the library, its file is not there now", hint="hubtool scan its folder")
