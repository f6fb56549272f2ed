"""Where a base is that somebody names: a path, a reference of the library, or a repository of the Hub, from its cache or pulled."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hubtool.actions.refs import locate
from hubtool.errors import FileError, FileMissing, HubError, HubtoolError
from hubtool.formats.documents import is_plain_name, read_json

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(?:@[\w.-]+)?")
_INDEX = "model_index.json"
_WANTED = ("model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors", "README.md")
_VARIANTS = ("*.fp16.*", "*.bf16.*", "*.non_ema.*")
_WEIGHTS = (".safetensors", ".bin")


def located(ref: str | os.PathLike[str], library: str | None = None, *, download: bool = True) -> Path:
    """The folder or file that ``ref`` means. A repository is looked for in the Hub's cache, then pulled (``download``).

    Raises ``FileMissing``, ``NotFound``, ``AmbiguousRef``, and ``HubError`` for a repository that is not here and cannot be fetched.
    """
    text = os.fspath(ref)
    if os.path.lexists(text) or not _REPOSITORY.fullmatch(text) or text.startswith("."):
        return locate(text, library)
    return _cached(text) or _pulled(text, library, download)


def _cached(text: str) -> Path | None:
    """The whole pipeline as huggingface_hub's cache holds it; None where anything is missing."""
    from hubtool.hub import local_cache
    from hubtool.hub.refs import parse_ref

    ref = parse_ref(text)
    found = local_cache.resolve(ref)
    folder = None if found is None else local_cache.folder(ref) / "snapshots" / found.ref.branch
    return folder if folder is not None and whole(folder) else None


def whole(folder: Path) -> bool:
    """Whether every component that the pipeline's index names is there, those with a configuration of weights with weights."""
    try:
        index = read_json(folder / _INDEX)
    except FileError:
        return False
    named = index.items() if isinstance(index, dict) else ()
    parts = [name for name, home in named if isinstance(home, list) and all(home[:2]) and is_plain_name(name)]
    return bool(parts) and all(_part(folder / name) for name in parts)


def _part(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    weights = any(path.suffix in _WEIGHTS for path in folder.iterdir())
    return weights or not (folder / "config.json").is_file()


def _pulled(text: str, library: str | None, download: bool) -> Path:
    from hubtool.hub.refs import parse_ref

    ref = parse_ref(text)
    target = _home() / ref.owner / f"{ref.name}@{ref.revision}" if ref.revision else _home() / ref.owner / ref.name
    if whole(target):
        return target
    hint = f"hubtool pull {text} -o FOLDER where there is a network, then name the folder"
    if not download:
        raise FileMissing(f"{text} is neither a path nor in the Hub's cache", path=text, hint=hint)
    _fetch(text, target, library, hint)
    if not whole(target):
        raise HubError(f"{text} is no diffusers pipeline with safetensors weights", hint=hint)
    return target


def _fetch(text: str, target: Path, library: str | None, hint: str) -> None:
    from hubtool.actions.pull import pull, raise_failed
    from hubtool.actions.pull_result import Options

    try:
        raise_failed(pull([text], Options(target, include=_WANTED, exclude=_VARIANTS, index=False, library=library)))
    except HubtoolError as error:
        error.hint = error.hint or hint
        raise


def _home() -> Path:
    """Where pulled bases lie: beside other things that can be fetched again."""
    from platformdirs import user_cache_path

    return user_cache_path("hubtool") / "bases"
