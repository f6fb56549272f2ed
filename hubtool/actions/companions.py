"""The files that belong to a model and lie beside it: sidecars of other programs, and previews. They go where it goes."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from hubtool.actions.scan_walk import EXTENSIONS

SIDECARS = (".civitai.info", ".metadata.json", ".json", ".cm-info.json", ".cminfo.json", ".txt", ".yaml")
_INDEX = ".safetensors.index.json"
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".avif", ".mp4", ".webm")
PREVIEWS = (*(f".preview{name}" for name in _PICTURES), *_PICTURES, ".thumb.jpg")


def companions(path: Path, indexed: Collection[str] = ()) -> list[Path]:
    """What belongs to the file at ``path`` alone, of what is there. ``indexed``: paths of artifacts, which belong to nobody.

    A sidecar that two models of the same name share (``a.safetensors``, ``a.ckpt``) stays with the other one.
    """
    if path.name.endswith(_INDEX):
        shards = re.compile(re.escape(path.name.removesuffix(_INDEX)) + r"-\d{5}-of-\d{5}\.safetensors")
        return sorted(file for file in path.parent.iterdir() if shards.fullmatch(file.name))
    stem, own = path.stem, os.fsencode(path.suffix.lower())
    others = (extension for extension in EXTENSIONS if extension not in (own, b".png"))
    if any(path.with_name(stem + os.fsdecode(extension)).exists() for extension in others):
        return []
    beside = (path.with_name(stem + extension) for extension in (*SIDECARS, *PREVIEWS))
    return [
        file
        for file in beside
        if file != path and str(file) not in indexed and file.is_file() and not file.is_symlink()
    ]
