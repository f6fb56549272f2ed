"""safetensors files: names, types and places from one read of the header."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from hubtool.errors import UnsupportedFile
from hubtool.formats import suspicion
from hubtool.formats.base import TensorFile
from hubtool.tensors import header as headers
from hubtool.tensors.reading import open_read
from hubtool.types import Finding


def read(path: Path, fd: int, size: int) -> TensorFile:
    """Read the header of an open file of ``size`` bytes; tensor data is not touched.

    ``tensors`` is in header order, ``header_bytes`` the header as it lies there. Raises ``CorruptFile`` or ``UnsafeFile``. Odd
    but harmless contents are findings.
    """
    header = headers.read(fd, size, path)
    return TensorFile(
        path,
        "safetensors",
        size,
        header.tensors,
        header.metadata,
        findings(header),
        files=(path,),
        header_bytes=header.raw,
    )


def read_header(path: Path) -> TensorFile:
    """``read`` for a path. Raises ``FileMissing``, ``FileError`` and ``UnsupportedFile`` (not a regular file) as well."""
    fd = open_read(path)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise UnsupportedFile("not a regular file", path=path)
        return read(path, fd, status.st_size)
    finally:
        os.close(fd)


def findings(header: headers.Header) -> tuple[Finding, ...]:
    """What is worth saying about a header that was read."""
    found = suspicion.of_metadata(header.metadata, header.tensors) if header.metadata else []
    if header.plain:
        return tuple(found)
    found += suspicion.of_names(header.tensors)
    found += suspicion.of_shapes(header.tensors)
    if not header.raw.startswith(b"{"):
        found.append(
            Finding("leading-whitespace", "warning", "blanks stand before the header, which not every reader accepts")
        )
    if header.unknown_fields:
        fields = ", ".join(map(ascii, header.unknown_fields[:5]))
        found.append(
            Finding("unknown-field", "warning", f"tensor entries hold fields that the format does not know: {fields}")
        )
    return tuple(found)
