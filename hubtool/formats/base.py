"""``TensorFile``: what every container reader returns. Names, shapes, byte ranges and metadata; no tensor data, nothing executed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hubtool.tensors.ref import TensorRef
from hubtool.types import Finding

EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class TensorFile:
    """An opened container.

    ``format``: ``safetensors``, ``torch-zip``, ``torch-legacy``, ``png``, ``sharded``, ``peft-folder``, ``diffusers-folder`` ...
    ``tensors``: name -> reference, in the file's own order (header order for safetensors, traversal order for pickles). Nested
    pickled containers are joined with ``.``; list positions and int keys are written in decimal.
    ``metadata``: the file's string metadata (safetensors ``__metadata__``; scalar leaves of a pickle as JSON strings).
    ``structure``: for pickles, the whole inert object: dict / list / tuple / scalars with ``TensorRef`` leaves; keys keep their type
    (a hypernetwork's are ints). ``None`` for safetensors.
    ``config``: JSON documents of a folder, by file name (``adapter_config.json``, ``model_index.json``, ``config.json`` ...).
    ``files``: every file read, weights first. ``header_bytes``: the raw JSON header of a safetensors file, without its length.
    """

    path: Path
    format: str
    size: int
    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str] = field(default_factory=lambda: EMPTY)
    findings: tuple[Finding, ...] = ()
    structure: Any = None
    config: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    files: tuple[Path, ...] = ()
    header_bytes: bytes | None = None
