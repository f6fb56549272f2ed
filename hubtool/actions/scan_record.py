"""From a file on disk to the record that the library keeps. Reads headers and samples; hashing comes later."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hubtool.actions.scan_walk import Candidate, candidate
from hubtool.errors import CorruptFile, FileError, FileMissing, HubtoolError
from hubtool.formats.base import TensorFile
from hubtool.registry.records import ArtifactRecord, FileStat
from hubtool.types import Finding

_SAMPLE = 64 << 10
_MAX_TEXT = 16 << 10  # characters of metadata that are searched
_MAX_VALUE = 2 << 10
_MAX_TAGS = 64
_MAX_TAG_TABLE = 4 << 20
_HEX = re.compile(r"(?:0x)?([0-9a-fA-F]{8,64})")
_CLAIMED = {
    "sshs_model_hash": "payload_sha256",
    "modelspec.hash_sha256": "modelspec_sha256",
    "sshs_legacy_hash": "sshs_legacy_hash",
}


@dataclass(frozen=True, slots=True)
class Described:
    """A candidate with what it is. ``record`` is None for what is no artifact at all (a picture), or was changing while it was read."""

    candidate: Candidate
    record: ArtifactRecord | None
    problem: str | None = None


def describe(found: Candidate) -> Described:
    """Read one candidate. A broken file is a record with a problem, never an exception; one that changes meanwhile is read twice."""
    for _ in range(2):
        record, problem = _read(found)
        now = candidate(found.path[: -len(found.relpath)], found.relpath)
        if now is None:
            return Described(found, None, "vanished while it was read")
        if now.stat.same(found.stat):
            return Described(found, record, problem)
        found = now
    return Described(found, None, "is changing; skipped")


def _read(found: Candidate) -> tuple[ArtifactRecord | None, str | None]:
    from hubtool.actions.inspect import inspect

    path = os.fsdecode(found.path)
    try:
        report = inspect(path, hashes=False, values=False)  # headers only
    except (HubtoolError, OSError) as error:
        return _broken(found, error), str(error)
    if found.relpath.lower().endswith(b".png") and report.identity.kind != "textual_inversion":
        return None, None
    record = _record(found, report.file, report.to_json())
    try:
        return replace(record, quick_id=_quick_id(found, report.file)), None
    except OSError as error:
        return replace(record, health="unreadable"), str(error)


def _broken(found: Candidate, error: HubtoolError | OSError) -> ArtifactRecord | None:
    """The record of a file that cannot be understood. A picture that is not an embedding is not even that."""
    extension = os.fsdecode(os.path.splitext(found.relpath)[1]).lower()
    if extension == ".png" or isinstance(error, FileMissing | FileNotFoundError):
        return None
    code = error.code if isinstance(error, HubtoolError) else "unreadable"
    unread = isinstance(error, OSError) or type(error) is FileError  # no permission, a failing disk
    health = "unreadable" if unread else "corrupt" if isinstance(error, CorruptFile) else "suspect"
    try:
        quick = _quick_id(found, None)
    except OSError:
        quick = None
    finding = Finding(code, "error", str(error))
    container = extension.removeprefix(".") or found.form
    return ArtifactRecord(found.stat.size, container, found.form, quick_id=quick, health=health, findings=(finding,))


def _record(found: Candidate, file: TensorFile, doc: Mapping[str, Any]) -> ArtifactRecord:
    findings = tuple(Finding(item["code"], item["severity"], item["message"]) for item in doc.get("findings", ()))
    return ArtifactRecord(
        found.stat.size,
        str(doc["format"]),
        found.form,
        kind=doc.get("kind"),
        algorithm=doc.get("algorithm"),
        family=doc.get("family"),
        layout=doc.get("layout"),
        base_model=_text(doc.get("base_model")),
        title=_title(file, doc),
        dtypes=tuple(doc.get("dtypes", ())),
        tensors=doc.get("tensors"),
        parameters=doc.get("parameters"),
        rank=max((int(rank) for rank in doc.get("ranks", ())), default=None),
        alpha=max((float(alpha) for alpha in doc.get("alphas", ()) if alpha is not None), default=None),
        search_text=search_text(file.metadata, doc),
        identity=zlib.compress(json.dumps(doc, default=str).encode(), 6),
        trigger_words=tuple(doc.get("trigger_words", ())),
        embedded_hashes=_claimed_hashes(file.metadata),
        findings=findings,
    )


def _text(value: object) -> str | None:
    return value[:_MAX_VALUE] if isinstance(value, str) and value else None


def _title(file: TensorFile, doc: Mapping[str, Any]) -> str | None:
    claims = doc.get("claims") or {}
    return (
        _text(claims.get("title"))
        or _text(file.metadata.get("modelspec.title"))
        or _text(file.metadata.get("ss_output_name"))
    )


def _claimed_hashes(metadata: Mapping[str, str]) -> dict[str, str]:
    found = {name: _HEX.fullmatch(metadata.get(key, "")) for key, name in _CLAIMED.items()}
    return {name: match[1].lower() for name, match in found.items() if match}


def search_text(metadata: Mapping[str, str], doc: Mapping[str, Any]) -> str:
    """The words of a file's metadata: short plain values, tokens of embeddings, and the most frequent training tags."""
    parts = [str(item["token"]) for item in doc.get("embeddings", ()) if item.get("token")]
    parts += [
        value for value in metadata.values() if len(value) <= _MAX_VALUE and not value.lstrip().startswith(("{", "["))
    ]
    return "\n".join([*parts, *_training_tags(metadata.get("ss_tag_frequency", ""))])[:_MAX_TEXT]


def _training_tags(text: str) -> list[str]:
    if not text.startswith("{") or len(text) > _MAX_TAG_TABLE:
        return []
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        return []
    totals: dict[str, int] = {}
    for tags in table.values():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, int):
                totals[tag] = totals.get(tag, 0) + count
    return sorted(totals, key=lambda tag: (-totals[tag], tag))[:_MAX_TAGS]


def _quick_id(found: Candidate, file: TensorFile | None) -> str:
    """Identity before the full hash: SHA256 over size, header and 64 KiB from the beginning, the middle and the end of each file."""
    digest = hashlib.sha256(b"quick1\0%d\0" % found.stat.size)
    digest.update((file.header_bytes if file else None) or b"")
    base = os.path.dirname(found.path) if found.form == "sharded" else found.path
    parts = sorted(os.fsencode(path) for path in file.files) if file and found.form != "file" else [found.path]
    for path in parts:
        if found.form != "file":
            digest.update(os.path.relpath(path, base) + b"\0")
        _sample(digest, path)
    return digest.hexdigest()


def _sample(digest: Any, path: bytes) -> None:
    if os.path.isdir(path):  # a broken folder: only its size is known
        return
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        for offset in sorted({0, max(0, (size - _SAMPLE) // 2), max(0, size - _SAMPLE)}):
            digest.update(os.pread(fd, _SAMPLE, offset))
    finally:
        os.close(fd)


def stat_now(path: bytes) -> FileStat | None:
    """The stat that ``describe`` would compare, for a path that may have gone."""
    parent, name = os.path.split(path)
    now = candidate(parent, name)
    return now.stat if now else None
