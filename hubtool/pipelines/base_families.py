"""Which family a base is of, told before weights are read or downloaded: by headers, or by the index of a repository."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hubtool.errors import (
    ConversionError,
    CorruptFile,
    FileMissing,
    HubError,
    LoadMismatch,
    MissingExtra,
    RecognitionError,
    Unsupported,
    UsageProblem,
)
from hubtool.formats import open_file
from hubtool.formats.documents import read_json
from hubtool.layouts.checkpoint_source import recognise
from hubtool.layouts.identify import identify
from hubtool.pipelines.families import family_of

BASES = ("checkpoint", "diffusers_pipeline")
INDEX = "model_index.json"


def families(base: str | Path) -> tuple[str, ...]:
    """The families that ``base`` (folder, single file, repository of the Hub) may be of: one, where it can be told; empty for unknown.

    Raises ``UsageProblem`` without a base, ``Unsupported`` for what is no base, ``FileMissing``, ``HubError``.
    """
    if not str(base):
        raise UsageProblem("no base is named", hint="name a folder, a file or a repository")
    path = Path(base)
    if path.exists():
        return _local(path)
    if path.is_absolute() or str(base).count("/") != 1:
        raise FileMissing("there is no such base", path=path)
    found = _announced(str(base))
    return () if found is None else (found,)


def check(base: str | Path, wanted: Collection[str], what: str) -> tuple[str, ...]:
    """``families(base)``. Raises ``LoadMismatch`` where ``what`` fits none of them, and what ``families`` raises."""
    found = families(base)
    if found and not {*found} & {*wanted}:
        named = " or ".join(found)
        raise LoadMismatch(f"{what} does not fit {named}, which {base} is", hint=f"families: {', '.join(wanted)}")
    return found


def of_index(folder: Path) -> str | None:
    """The family that a folder's ``model_index.json`` announces. Raises ``CorruptFile``, ``FileMissing``."""
    index = read_json(folder / INDEX)
    if not isinstance(index, dict):
        raise CorruptFile("this is no index of a pipeline", path=folder / INDEX)
    config = folder / "unet" / "config.json"
    unet = read_json(config) if "unet" in index and config.is_file() else None
    return _of(index, unet if isinstance(unet, dict) else None)


def _local(path: Path) -> tuple[str, ...]:
    file = open_file(path)
    found = identify(file)
    if found.kind not in BASES:
        raise Unsupported(
            f"a {found.kind} is no base: it makes no pictures by itself", path=path, hint=f"hubtool inspect {path}"
        )
    if found.family:
        return (found.family,)
    try:
        source = recognise(file)
    except (RecognitionError, ConversionError):
        source = None
    return found.family_candidates if source is None else (source.pipeline.family,)


def _announced(base: str) -> str | None:
    """What a repository's ``model_index.json`` says, with the UNet's config where classes are shared."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise MissingExtra("a base of the Hub", "hub") from None

    def document(name: str) -> dict[str, Any]:
        try:
            found = read_json(Path(hf_hub_download(base, name)))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise HubError(f"{base} cannot be asked what it is: {error}") from error
        return found if isinstance(found, dict) else {}

    index = document(INDEX)
    return _of(index, document("unet/config.json") if "unet" in index else None)


def _of(index: Mapping[str, Any], unet: Mapping[str, Any] | None) -> str | None:
    """Family by a stand-in of the pipeline: its class and the UNet's configuration are all that telling it needs."""
    config = None if unet is None else {"block_out_channels": (), **unet}
    parts = {} if config is None else {"unet": type("UNet", (), {"config": config})()}
    name = str(index.get("_class_name", ""))
    return family_of(type(name if name.isidentifier() else "Unknown", (), parts)())
