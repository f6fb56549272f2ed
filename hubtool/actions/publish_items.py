"""What is to be published: each REF opened, identified, cleaned of private metadata, with the pictures that lie beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hubtool.actions.inspect import Report, inspect
from hubtool.actions.refs import locate
from hubtool.errors import FileMissing, UsageProblem
from hubtool.formats.base import TensorFile
from hubtool.hub import pictures
from hubtool.hub.layout import safe_name
from hubtool.hub.pictures import Shown
from hubtool.hub.privacy import Cleaning
from hubtool.layouts import receipt as receipts
from hubtool.layouts.content import content_id
from hubtool.types import Finding

_MAX_HEADER = 64 << 20


@dataclass(frozen=True, slots=True)
class Item:
    """One REF. ``file`` is the opened artifact with cleaned metadata; ``dirty``: whether cleaning changed it."""

    path: Path
    report: Report
    file: TensorFile
    dirty: bool

    @property
    def stem(self) -> str:
        name = self.path.name
        return name if self.path.is_dir() else name.rpartition(".")[0] or name

    @property
    def kind(self) -> str:
        return self.report.identity.kind

    @property
    def published_name(self) -> str:
        """Its own name, as a safetensors file."""
        return safe_name(f"{self.stem}.safetensors")

    def content(self) -> str | None:
        """The hash of its tensors, whatever layout they are in."""
        return content_id(self.file)


@dataclass(slots=True)
class Cleaner:
    """Cleans metadata and documents, and collects what was found."""

    cleaning: Cleaning
    drop: frozenset[str] = frozenset()
    findings: list[Finding] = field(default_factory=list)

    def file(self, file: TensorFile) -> TensorFile:
        """The file with metadata, header and configs that may be published; the same object where nothing changes."""
        metadata = self.metadata(file.metadata, file.path.name)
        config = {name: self.cleaning.document(doc, name) for name, doc in file.config.items()}
        if metadata == dict(file.metadata) and config == dict(file.config):
            return file
        return replace(file, metadata=metadata, config=config, header_bytes=_header(file.header_bytes, metadata))

    def metadata(self, values: Mapping[str, str], where: str) -> dict[str, str]:
        """String metadata; what a receipt of origin remembers of another file is cleaned too."""
        given = {key: text for key, text in values.items() if key not in self.drop}
        origin = given.pop(receipts.KEY, None)
        cleaned = self.cleaning.metadata(given, where)
        kept = None if origin is None else self._origin(origin, where)
        return cleaned if kept is None else {**cleaned, receipts.KEY: kept}

    def _origin(self, text: str, where: str) -> str | None:
        found = receipts.load({receipts.KEY: text})
        if found is None:
            return None  # nobody could read it, neither can we vouch for it
        try:
            said = json.loads(found.raw).get("__metadata__", {})
        except (ValueError, RecursionError, AttributeError):
            return None
        cleaned = self.metadata(said, f"{where} {receipts.KEY}") if isinstance(said, dict) else {}
        raw = found.raw if cleaned == said else _header(found.raw, cleaned) or found.raw
        return text if raw == found.raw else replace(found, raw=raw).dump()


def _header(raw: bytes | None, metadata: Mapping[str, str]) -> bytes | None:
    """The JSON of a header with other metadata; its tensors stay where they are."""
    if raw is None or len(raw) > _MAX_HEADER:
        return None
    document = json.loads(raw)
    document["__metadata__"] = dict(metadata)
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def gather(refs: Sequence[str], cleaner: Cleaner, library: str | None) -> list[Item]:
    """Open every REF; the first is the one that loads without arguments. Raises ``NotFound``, ``FileError``, ``UsageProblem``."""
    if not refs:
        raise UsageProblem("nothing to publish is named")
    items = [_item(locate(ref, library), cleaner) for ref in refs]
    paths = [item.path.resolve() for item in items]
    if len(set(paths)) < len(paths):
        raise UsageProblem("a file is named twice")
    for item in items[1:]:
        if item.path.is_dir():
            raise UsageProblem("only the first REF may be a folder", path=item.path)
    return items


def _item(path: Path, cleaner: Cleaner) -> Item:
    report = inspect(path, hashes=False)
    file = cleaner.file(report.file)
    return Item(path, report, file, file is not report.file)


def previews(item: Item, named: Sequence[Path], cleaner: Cleaner) -> list[Shown]:
    """The pictures beside a file (``X.preview.png``, ``X.png`` ...) and those named; secrets in them are found before they go."""
    beside = [
        item.path.with_name(f"{item.stem}{dot}{suffix}") for dot in (".preview", "") for suffix in pictures.SUFFIXES
    ]
    found = [path for path in beside if path.is_file() and path != item.path]
    shown = []
    for path in dict.fromkeys((*found, *named)):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise FileMissing(f"cannot read the picture: {error.strerror}", path=path) from error
        picture = pictures.read(data, str(path))
        cleaner.cleaning.raw(picture.data, path.name)
        cleaner.cleaning.text(f"{picture.prompt}\n{picture.negative}", path.name)
        if picture.removed:
            cleaner.findings.append(
                Finding("picture-metadata", "info", f"{path.name}: everything but the pixels was left out")
            )
        shown.append(picture)
    return shown


def document(file: TensorFile, key: str, name: str) -> Any:
    """A JSON document kept in a file's metadata under ``key``, or in a folder as the file ``name``; None where there is none."""
    text = file.metadata.get(key)
    path = file.path / name
    try:
        if text is not None:
            return json.loads(text)
        return json.loads(path.read_bytes()) if file.path.is_dir() and path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
