"""From a file to the adapter a pipeline shall get."""

from __future__ import annotations

from pathlib import Path

from hubtool.adapters.identity import Identity
from hubtool.adapters.ir import Adapter
from hubtool.errors import LoadMismatch, Unsupported
from hubtool.formats import open_file
from hubtool.formats.base import TensorFile
from hubtool.layouts import parse_file
from hubtool.layouts.identify import identify

_SHOWN = 3


def read(source: Adapter | str | Path, family: str | None) -> Adapter:
    """The adapter in ``source``. ``family`` settles a file that fits several.

    Raises ``Unsupported`` for another kind of file, ``LoadMismatch`` when a tensor belongs to no module: loading the rest would look
    like success.
    """
    adapter = source if isinstance(source, Adapter) else _from_file(Path(source), family)
    if adapter.extras:
        names = ", ".join(list(adapter.extras)[:_SHOWN])
        raise LoadMismatch(f"{len(adapter.extras)} tensors belong to no module: {names}", hint="hubtool explain FILE")
    return adapter


def _from_file(path: Path, family: str | None) -> Adapter:
    file = open_file(path)
    identity = identify(file)
    if identity.kind == "textual_inversion":
        return Adapter(identity.family, {}, identity.embeddings, metadata=file.metadata, findings=identity.findings)
    if identity.kind != "lora":
        raise Unsupported(
            f"{_called(identity)} cannot be loaded into a pipeline", path=path, hint=f"hubtool inspect {path}"
        )
    return _parsed(file, family)


def _called(identity: Identity) -> str:
    return (
        f"this is of kind {identity.kind}, which"
        if identity.kind != "unknown"
        else "what this is could not be told, and it"
    )


def _parsed(file: TensorFile, family: str | None) -> Adapter:
    parsed = parse_file(file)
    if parsed.adapter.family is None and family in parsed.candidates:
        return parse_file(file, family).adapter
    return parsed.adapter
