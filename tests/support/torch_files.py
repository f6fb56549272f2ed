"""Torch files built byte by byte, good and bad, without torch and without hubtool's own writer."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MAGIC = 0x1950A86A20F9469CFC6C


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes(16, "little", signed=True)
    return b"\x8a\x10" + data


def numbers(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(
    key: str = "0", kind: str = "FloatStorage", numel: int = 4, location: str = "cpu", view: bytes = b""
) -> bytes:
    return (
        b"("
        + text("storage")
        + f"ctorch\n{kind}\n".encode()
        + text(key)
        + text(location)
        + number(numel)
        + view
        + b"tQ"
    )


def tensor(
    shape: Iterable[int] = (2, 2),
    stride: Iterable[int] = (2, 1),
    offset: int = 0,
    inner: bytes | None = None,
    more: bytes = b"",
) -> bytes:
    """Opcodes of ``_rebuild_tensor_v2``."""
    body = (inner or storage()) + number(offset) + numbers(shape) + numbers(stride)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + body + b"\x89ccollections\nOrderedDict\n)R" + more + b"tR"


def mapping(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def zip_bytes(
    body: bytes, records: Mapping[str, bytes] | None = None, *, method: int = zipfile.ZIP_STORED, root: str = "archive"
) -> bytes:
    """A torch zip around ``body`` (opcodes of the object). ``records``: storages and other members by name below the root."""
    members = {
        "data.pkl": pickled(body),
        "version": b"3\n",
        **({"data/0": floats(1, 2, 3, 4)} if records is None else records),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(f"{root}/{name}"), data, method)
    return buffer.getvalue()


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def legacy_bytes(
    body: bytes, records: Mapping[str, tuple[int, bytes]] | None = None, *, magic: Any = MAGIC, tail: bytes = b""
) -> bytes:
    """A legacy stream around ``body``. ``records``: storage key -> (elements, bytes)."""
    records = {"0": (4, floats(1, 2, 3, 4))} if records is None else records
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = [pickle.dumps(value, 2) for value in (magic, 1001, system)]
    data = b"".join(struct.pack("<q", numel) + raw for numel, raw in records.values())
    return b"".join(head) + pickled(body) + pickle.dumps(sorted(records), 2) + data + tail


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
