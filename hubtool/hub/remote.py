"""Headers read from afar: what a safetensors file on a hub is made of, for at most 200 KB over the line and no tensor data.

The result is an ordinary ``TensorFile`` whose path leads nowhere, so that nothing can read values through it by mistake.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hubtool.errors import CorruptFile, HubError, UnsafeFile, UnsupportedFile
from hubtool.formats import safetensors, suspicion
from hubtool.formats.base import TensorFile
from hubtool.hub.client import Client, Entry
from hubtool.hub.header_cache import HeaderCache
from hubtool.hub.refs import HubRef
from hubtool.hub.retrying import BrokenAnswer
from hubtool.tensors import header as headers
from hubtool.tensors.dtypes import BITS, numel
from hubtool.tensors.ref import TensorRef
from hubtool.types import Finding

BUDGET = 200_000
_FIRST = 64 << 10
_STEP = 16 << 10
_NOWHERE = Path("/dev/null")  # no path below it can ever be opened
_ENTRY = re.compile(r'"(?:[^"\\]|\\.)*"\s*:\s*\{')
_ROLE = re.compile(r"\.(?=lora|hada_|lokr_|b?oft_|alpha$|dora_|diff|[wb]_norm|on_input|[ab][12]\.|weight$|bias$)")
_BETWEEN = re.compile(r"[\s,]*")
_SCAN = json.JSONDecoder().raw_decode


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file known by its header. ``received``: bytes that came over the network for it. ``whole``: the header was read to its end."""

    entry: Entry
    file: TensorFile
    received: int
    whole: bool = True


class _Reader:
    """Ranges of one remote file, every byte counted against the budget."""

    def __init__(self, client: Client, ref: HubRef, entry: Entry, budget: int) -> None:
        self._client = client
        self._ref = ref
        self._entry = entry
        self._budget = budget
        self.received = 0

    def read(self, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop``, which the file has. Raises ``HubError``, also when that would pass the budget."""
        return self._client.ask(self._ref.at(self._ref.branch, self._entry.path), lambda: self._once(start, stop))

    def _once(self, start: int, stop: int) -> bytes:
        with self._client.stream(self._ref, self._entry.path, start=start, stop=stop) as response:
            skip = self._skipped(response, start)
            self._afford(skip + stop - start)
            data = bytearray()
            try:
                for chunk in response.iter_bytes(_STEP):
                    data += chunk
                    if len(data) >= skip + stop - start:
                        break
            finally:
                self.received += response.num_bytes_downloaded
        if len(data) < skip + stop - start:
            raise BrokenAnswer("fewer bytes than asked for")
        return bytes(data[skip : skip + stop - start])

    def _skipped(self, response: Any, start: int) -> int:
        """Bytes before ``start`` that come as well: none, unless the server ignores Range."""
        if response.status_code != 206:
            return start
        total = response.headers.get("content-range", "").rpartition("/")[2]
        if total not in ("*", str(self._entry.size)):
            raise BrokenAnswer("another file than listed")
        return 0

    def _afford(self, count: int) -> None:
        if self.received + count > self._budget:
            raise HubError(
                f"the hub ignores ranges: {self._entry.path} would cost {count} bytes, more than the {self._budget} allowed",
                hint=f"hubtool pull {self._ref}",
            )


def remote_path(ref: HubRef, path: str) -> Path:
    """The path that stands for a remote file inside a ``TensorFile``: nothing lies there."""
    return _NOWHERE / ref.owner / ref.name / path


def shown(text: str, ref: HubRef) -> str:
    """``text`` with stand-in paths written as references."""
    return text.replace(f"{_NOWHERE}/{ref.repo}/", f"hf://{ref.repo}/")


def read_remote(
    client: Client, ref: HubRef, entry: Entry, budget: int = BUDGET, cache: HeaderCache | None = None
) -> RemoteFile:
    """Read the header of a safetensors file of the pinned ``ref``; one longer than ``budget`` as far as the budget goes.

    ``cache``: what was read before by the hash of the file costs nothing. Raises ``UnsupportedFile`` for any other container,
    ``CorruptFile`` and ``UnsafeFile`` for a bad header, ``HubError``.
    """
    if not entry.path.lower().endswith((".safetensors", ".sft")):
        raise UnsupportedFile(
            "only safetensors headers are read from afar", path=entry.path, hint=f"hubtool pull {ref}"
        )
    path = remote_path(ref, entry.path)
    try:
        known = cache.get(entry.digest) if cache else None
        if known is not None and (found := _again(known, entry, path)) is not None:
            return found
        reader = _Reader(client, ref, entry, budget)
        head, tail = _pieces(reader, entry, path, budget)
        read = _understood(head, tail, entry, path, reader.received)
    except (CorruptFile, UnsafeFile) as error:
        error.path = str(ref.at(ref.branch, entry.path))
        raise
    if cache:
        cache.put(entry.digest, head, tail)
    return read


def _again(known: tuple[bytes, bytes], entry: Entry, path: Path) -> RemoteFile | None:
    """What the cache has; None where that makes no sense, and the file is to be asked."""
    try:
        return _understood(*known, entry, path, 0)
    except (CorruptFile, UnsafeFile):
        return None


def _pieces(reader: _Reader, entry: Entry, path: Path, budget: int) -> tuple[bytes, bytes]:
    """(the file up to the end of its header, nothing), or the two ends of a header longer than the budget."""
    if entry.size < 10:
        raise CorruptFile(f"{entry.size} bytes are too few for a safetensors file", path=path, offset=0)
    first = reader.read(0, min(_FIRST, entry.size, budget))
    length = int.from_bytes(first[:8], "little")
    if not 2 <= length <= min(headers.MAX_HEADER, entry.size - 8):
        raise CorruptFile(f"the header claims {length} bytes in a file of {entry.size}", path=path, offset=0)
    end = 8 + length
    if end <= budget:
        return first[:end] + (reader.read(len(first), end) if end > len(first) else b""), b""
    tail_start = end - (budget - reader.received)
    return first, reader.read(tail_start, end) if tail_start < end else b""


def _understood(head: bytes, tail: bytes, entry: Entry, path: Path, received: int) -> RemoteFile:
    length = int.from_bytes(head[:8], "little")
    end = 8 + length
    if len(head) == end:
        file = _file(headers.parse(head[8:], entry.size - end, path), entry, path)
        return RemoteFile(entry, file, received)
    return RemoteFile(entry, _piece(head[8:], tail, length, entry, path), received, whole=False)


def _file(header: headers.Header, entry: Entry, path: Path) -> TensorFile:
    return TensorFile(
        path, "safetensors", entry.size, header.tensors, header.metadata, safetensors.findings(header), files=(path,),
        header_bytes=header.raw,
    )  # fmt: skip


def _piece(head: bytes, tail: bytes, length: int, entry: Entry, path: Path) -> TensorFile:
    """What the beginning and the end of a long header say, every entry checked by itself."""
    base = 8 + length
    metadata: dict[str, str] = {}
    first = list(_pairs_of_head(head.decode("utf-8", "ignore"), metadata))
    last = list(_pairs_of_tail(tail.decode("utf-8", "ignore")))
    cut = {_stem(pairs[at][0]) for pairs, at in ((first, -1), (last, 0)) if pairs}
    tensors = {
        name: _ref(name, value, path, base, entry.size) for name, value in first + last if _stem(name) not in cut
    }
    if not tensors:
        raise CorruptFile("no tensor can be read at the ends of the header", path=path, offset=8)
    said = (
        f"the header has {length} bytes, of which {len(head) + len(tail)} were read: {len(tensors)} tensors are known"
    )
    findings = (Finding("header-partial", "info", said), *suspicion.of_metadata(metadata, tensors))
    return TensorFile(path, "safetensors", entry.size, tensors, metadata, findings, files=(path,))


def _stem(name: str) -> str:
    """The module of an adapter's tensor: one at a cut is left out whole, since half a module looks like a broken file."""
    return _ROLE.split(name, maxsplit=1)[0]


def _pairs_of_head(text: str, metadata: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """Whole entries from the beginning on; the whole entries of ``__metadata__`` go into ``metadata``."""
    at = text.find("{") + 1
    for name, value, _ in _pairs(text, at):
        if name == headers.METADATA and isinstance(value, dict):
            metadata.update({key: item for key, item in value.items() if isinstance(item, str)})
        else:
            yield name, value
    opened = re.compile(rf'\s*"{headers.METADATA}"\s*:\s*\{{').match(text, at)
    if opened and not metadata:  # longer than what was read
        metadata.update({name: value for name, value, _ in _pairs(text, opened.end()) if isinstance(value, str)})


def _pairs_of_tail(text: str) -> Iterator[tuple[str, Any]]:
    """Entries from the first place on from which everything up to the end of the header can be read."""
    for match in _ENTRY.finditer(text):
        pairs = list(_pairs(text, match.start()))
        if pairs and text[pairs[-1][2] :].strip() == "}":
            yield from ((name, value) for name, value, _ in pairs)
            return


def _pairs(text: str, at: int) -> Iterator[tuple[str, Any, int]]:
    """(name, value, end) of ``"name": value, ...`` until something is cut off."""
    while True:
        try:
            at = _end_of(_BETWEEN, text, at)
            name, at = _SCAN(text, at)
            at = text.index(":", at) + 1
            value, at = _SCAN(text, _end_of(_BETWEEN, text, at))
        except (ValueError, RecursionError):
            return
        if not isinstance(name, str):
            return
        yield name, value, at


def _end_of(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at


def _ref(name: str, value: Any, path: Path, base: int, size: int) -> TensorRef:
    """The checked tensor of one entry. Raises ``CorruptFile``."""
    entry: dict[str, Any] = value if isinstance(value, dict) else {}
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not (isinstance(dtype, str) and dtype in BITS and _naturals(shape) and _naturals(offsets) and len(offsets) == 2):
        raise CorruptFile(f"the entry of {name[:80]!a} is no tensor", path=path, offset=8)
    begin, end = offsets
    if (end - begin) * 8 != numel(tuple(shape)) * BITS[dtype] or base + end > size:
        raise CorruptFile(f"{name[:80]!a} does not fit its place", path=path, offset=8)
    return TensorRef(name, dtype, tuple(shape), path, base + begin, base + end)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def without_values(file: TensorFile) -> TensorFile:
    """The file as recognisers may see it: scalars (alphas) read as one, because their values were not fetched."""
    tensors: Mapping[str, TensorRef] = {
        name: replace(ref, inline=_ONE[ref.dtype], start=0, end=len(_ONE[ref.dtype]))
        if numel(ref.shape) == 1 and ref.dtype in _ONE
        else ref
        for name, ref in file.tensors.items()
    }
    return replace(file, tensors=tensors)


_ONE = {
    "F64": b"\0\0\0\0\0\0\xf0\x3f", "F32": b"\0\0\x80\x3f", "F16": b"\0\x3c", "BF16": b"\x80\x3f",
    "I64": b"\1\0\0\0\0\0\0\0", "I32": b"\1\0\0\0", "I16": b"\1\0", "I8": b"\1", "U8": b"\1",
}  # fmt: skip
