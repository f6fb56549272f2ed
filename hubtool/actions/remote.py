"""What lies in a repository of a hub, without downloading it: ``inspect hf://...`` and ``scan hf://owner/name``.

The listing gives the SHA256 of every large file, so what the library has is known before a byte is fetched. Of the rest only headers come.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hubtool.actions.library import open_store, reading
from hubtool.actions.where import library_exists
from hubtool.errors import HubtoolError, NotFound
from hubtool.types import Finding

if TYPE_CHECKING:
    from hubtool.formats.base import TensorFile
    from hubtool.hub.client import Client, Entry, Resolved
    from hubtool.hub.header_cache import HeaderCache

COLUMNS = ("path", "size", "kind", "algorithm", "family", "layout", "ranks", "state", "received")
WEIGHTS = frozenset({".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf"})
_AT_ONCE = 8
_MAX_CONFIG = 64 << 10
_MAX_DEPTH = 16
_HEADER = frozenset({".safetensors", ".sft"})


@dataclass(frozen=True, slots=True)
class RemoteReport:
    """One file of a repository. ``document``: as ``inspect --json``; None with ``error``. ``id``: the same bytes in the library."""

    entry: Entry
    ref: str
    document: Mapping[str, Any] | None = None
    id: str | None = None
    places: tuple[str, ...] = ()
    received: int = 0
    error: HubtoolError | None = None
    read: bool = False  # its header was, now or once before

    @property
    def state(self) -> str:
        """``known``: in the library; ``new``: read from its header; ``unread``: listed only; ``broken``."""
        if self.error is not None:
            return "broken"
        return "known" if self.id else "new" if self.read else "unread"

    def to_json(self) -> dict[str, Any]:
        """The document of ``inspect``, with what the hub and the library know beside it."""
        entry = self.entry
        hub = {
            "ref": self.ref,
            "file": entry.path,
            "oid": entry.oid,
            "sha256": entry.sha256,
            "xet": entry.xet,
            "received": self.received,
        }
        beside = {"hub": hub, "library": {"id": self.id, "paths": list(self.places)} if self.id else None}
        if self.error is not None:
            return {"path": self.ref, "size": entry.size, "error": self.error.to_json(), **beside}
        return {**(self.document or {}), "path": self.ref, **beside}

    def row(self) -> dict[str, Any]:
        """A row of a listing."""
        document = self.document or {}
        names = ("kind", "algorithm", "family", "family_candidates", "layout", "ranks", "base_model", "trigger_words")
        facts = {name: document.get(name) for name in names}
        problem = {"error": self.error.to_json()} if self.error else {}
        head = {"path": self.entry.path, "ref": self.ref, "size": self.entry.size, "sha256": self.entry.sha256}
        return {**head, **facts, "state": self.state, "id": self.id, "received": self.received, **problem}


@dataclass(frozen=True, slots=True)
class RemoteIndex:
    """A repository at one commit, file by file."""

    repo: str
    revision: str
    commit: str
    files: tuple[RemoteReport, ...]
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def received(self) -> int:
        """Bytes of content that came over the network."""
        return sum(file.received for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """The document of ``scan hf://... --json``."""
        states = [file.state for file in self.files]
        head = {"repo": self.repo, "revision": self.revision, "commit": self.commit, "received": self.received}
        counts = {state: states.count(state) for state in ("known", "new", "unread", "broken")}
        return {**head, **counts, "files": [file.row() for file in self.files]}


def inspect_remote(
    text: str, library: str | None = None, *, client: Client | None = None, refresh: bool = False
) -> list[RemoteReport]:
    """Say what the file, or every weights file, behind a reference is. Raises ``HubError``, ``NotFound``, ``UsageProblem``."""
    return list(index_remote(text, library, client=client, record=False, refresh=refresh).files)


def index_remote(
    text: str, library: str | None = None, *, client: Client | None = None, record: bool = True, refresh: bool = False
) -> RemoteIndex:
    """Read a repository (a folder, a file of it) from its listing and headers.

    ``record``: note in the library that artifacts it has are these files. ``refresh``: headers that were read before are read again. A file
    that cannot be read is reported, not raised.
    """
    from hubtool.hub.client import Client, endpoint_of
    from hubtool.hub.header_cache import HeaderCache
    from hubtool.hub.refs import parse_ref

    client = client or Client()
    ref = parse_ref(text, endpoint_of(client.endpoint))
    resolved = client.resolve(ref)
    listed = client.tree(resolved.ref)
    wanted = _weights(listed, ref.path)
    if not wanted:
        raise NotFound(f"{ref} has no weights", hint=f"it has: {', '.join(entry.path for entry in listed[:8])}")
    known = _known(wanted, library)
    fresh = [entry for entry in wanted if entry.path not in known]
    look = _Look(client, resolved, listed, HeaderCache(refresh=refresh))
    with ThreadPoolExecutor(_AT_ONCE, "headers") as pool:
        read = dict(zip([one.path for one in fresh], pool.map(look.read, fresh), strict=True))
    look.cache.trim()
    files = tuple(
        replace(known[entry.path], ref=str(_ref(resolved, entry))) if entry.path in known else read[entry.path]
        for entry in wanted
    )
    index = RemoteIndex(ref.repo, resolved.revision, resolved.commit, files, resolved.card)
    if record and known:
        _record(client, resolved, index, library)
    return index


def _weights(listed: Sequence[Entry], path: str | None) -> list[Entry]:
    """The weights below ``path``; whatever was named itself."""
    if path is not None:
        exact = [entry for entry in listed if entry.path == path]
        if exact:
            return exact
        listed = [entry for entry in listed if entry.path.startswith(path + "/")]
    return [entry for entry in listed if os.path.splitext(entry.path)[1].lower() in WEIGHTS]


def _ref(resolved: Resolved, entry: Entry) -> Any:
    return resolved.ref.at(resolved.commit, entry.path)


def _known(entries: Sequence[Entry], library: str | None) -> dict[str, RemoteReport]:
    """Reports of the files whose bytes the library has, by path; nothing is fetched for them."""
    from hubtool.actions.catalogue import show
    from hubtool.registry import browse, hub_facts

    if not library_exists(library):
        return {}
    with reading(library) as reader:
        keys = hub_facts.artifacts_by_sha256(reader, [entry.sha256 for entry in entries if entry.sha256])
        found = {}
        for entry in entries:
            key = keys.get(entry.sha256 or "")
            if key is not None:
                row = browse.by_key(reader, key)
                places = tuple(place.path for place in row.places if place.state == "present")
                found[entry.path] = RemoteReport(entry, "", show(reader, row.id), row.id, places)
    return found


@dataclass(frozen=True, slots=True)
class _Look:
    """A repository at one commit, and what was read of its files before."""

    client: Client
    resolved: Resolved
    listed: Sequence[Entry]
    cache: HeaderCache

    def read(self, entry: Entry) -> RemoteReport:
        """A file that the library does not have, from its header."""
        from hubtool.hub.remote import read_remote

        ref = str(_ref(self.resolved, entry))
        if os.path.splitext(entry.path)[1].lower() not in _HEADER:
            return RemoteReport(entry, ref, _unread(entry))
        try:
            found = read_remote(self.client, self.resolved.ref, entry, cache=self.cache)
            file, more = self._with_config(found.file, entry)
            document = _document(file, entry, self.resolved, whole=found.whole)
            return RemoteReport(entry, ref, document, received=found.received + more, read=True)
        except HubtoolError as error:
            return RemoteReport(entry, ref, error=error)

    def _with_config(self, file: TensorFile, entry: Entry) -> tuple[TensorFile, int]:
        """A PEFT adapter is only understood together with the configuration beside it. (file, bytes fetched)"""
        from hubtool.tensors.strict_json import JsonError, loads_config

        folder, _, name = entry.path.rpartition("/")
        wanted = f"{folder}/adapter_config.json" if folder else "adapter_config.json"
        config = next((other for other in self.listed if other.path == wanted and other.size <= _MAX_CONFIG), None)
        if name != "adapter_model.safetensors" or config is None:
            return file, 0
        data, received = self._small(config)
        try:
            document = loads_config(data, max_depth=_MAX_DEPTH)
        except JsonError:
            return file, received
        if not isinstance(document, dict):
            return file, received
        return replace(file, format="peft-folder", config={"adapter_config.json": document}), received

    def _small(self, entry: Entry) -> tuple[bytes, int]:
        """(a small file, bytes fetched for it)"""
        from hubtool.hub.checking import Checker

        known = self.cache.get(entry.digest)
        if known is not None and Checker(entry).of(known[0]) == entry.digest:
            return known[0], 0
        data = self.client.read(self.resolved.ref, entry, _MAX_CONFIG)
        self.cache.put(entry.digest, data)
        return data, len(data)


def _document(file: TensorFile, entry: Entry, resolved: Resolved, *, whole: bool) -> dict[str, Any]:
    from hubtool.actions.inspect import Report
    from hubtool.errors import FileError
    from hubtool.hub.remote import shown, without_values
    from hubtool.layouts.identify import identify

    try:
        identity = replace(identify(without_values(file)), alphas=())
    except FileError as error:
        if whole and error.exit_code == 7:  # broken; not out of reach, not half known
            raise
        identity = _by_nothing()
    findings = tuple(dict.fromkeys((*file.findings, *identity.findings)))
    said = tuple(replace(found, message=shown(found.message, resolved.ref)) for found in findings)
    return Report(file, identity, {"sha256": entry.sha256}, said).to_json()


def _by_nothing() -> Any:
    from hubtool.adapters.identity import Identity

    finding = Finding("more-needed", "info", "what was fetched of it does not tell what this is")
    return Identity("unknown", findings=(finding,))


def _unread(entry: Entry) -> dict[str, Any]:
    """The document of a file of which the hub's listing is all that is known."""
    from pathlib import Path

    from hubtool.actions.inspect import Report
    from hubtool.adapters.identity import Identity
    from hubtool.formats.base import TensorFile

    finding = Finding("not-read", "info", "only safetensors headers are read from afar; hubtool pull fetches the file")
    container = os.path.splitext(entry.path)[1].lower().removeprefix(".") or "unknown"
    file = TensorFile(Path(entry.path), container, entry.size, {})
    return Report(file, Identity("unknown"), {"sha256": entry.sha256}, (finding,)).to_json()


def _record(client: Client, resolved: Resolved, index: RemoteIndex, library: str | None) -> None:
    """Tie the artifacts of the library to the files they are."""
    from hubtool.registry import browse
    from hubtool.registry.hub_store import Origin, origins, record_origin

    with open_store(library) as store:
        for file in index.files:
            if file.id is None:
                continue
            key = browse.find(store, file.id).key
            entry = file.entry
            if any(
                one.repo == index.repo and one.path == entry.path and one.how != "linked"
                for one in origins(store, artifact=key)
            ):
                continue  # it was pulled or published: that says more
            place = (client.endpoint, index.repo, entry.path, resolved.commit)
            record_origin(
                store, key, Origin(*place, "linked", resolved.revision, entry.sha256, entry.oid or None, entry.size)
            )
