"""Containers: path -> TensorFile. Bytes in, names and ranges out."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from hubtool.errors import CorruptFile, FileError, FileMissing, UnsupportedFile
from hubtool.formats.base import TensorFile
from hubtool.types import Finding

__all__ = ["TensorFile", "open_file"]

_INDEX_SUFFIX = ".index.json"
# What a file name promises, where it promises anything.
_PROMISES = {
    ".safetensors": ("safetensors",), ".sft": ("safetensors",), ".png": ("png",),
    **dict.fromkeys((".pt", ".pth", ".ckpt", ".bin"), ("torch-zip", "torch-legacy")),
}  # fmt: skip


def open_file(path: str | Path) -> TensorFile:
    """Open any file or folder by its content; nothing in it is executed.

    Names, shapes and byte ranges are read, tensor data is not. A name that lies about the content is a finding. Raises
    ``FileMissing``, ``FileError`` (no permission), and for bad content ``CorruptFile``, ``UnsafeFile`` or ``UnsupportedFile``.
    """
    path = Path(path)
    fd = _open(path)
    try:
        before = os.fstat(fd)
        if stat.S_ISDIR(before.st_mode):
            return _module("folder").read(path)
        if not stat.S_ISREG(before.st_mode):
            raise UnsupportedFile("not a regular file but a pipe, a socket or a device", path=path)
        try:
            file = _read(path, fd, before.st_size)
        finally:
            _check_unchanged(path, before, os.fstat(fd))
    finally:
        os.close(fd)
    return _with_promise(file)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise FileMissing("no such file or folder", path=path) from error
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise UnsupportedFile("not a regular file but a pipe, a socket or a device", path=path) from error
        raise FileError(f"cannot open: {error.strerror or error}", path=path) from error
    except ValueError as error:
        raise FileMissing("no file can have this name", path=path) from error


def _read(path: Path, fd: int, size: int) -> TensorFile:
    from hubtool.formats import sniff

    if path.name.lower().endswith(_INDEX_SUFFIX):
        return _module("sharded").read(path)
    try:
        return _module(sniff.reader_of(path, fd, size)).read(path, fd, size)
    except OSError as error:
        raise FileError(f"cannot read: {error.strerror or error}", path=path) from error


def _module(name: str) -> Any:
    return import_module(f"hubtool.formats.{name}")


def _check_unchanged(path: Path, before: os.stat_result, after: os.stat_result) -> None:
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise CorruptFile(
            "the file is changing while it is read", path=path, hint="wait until the download has finished"
        )


def _with_promise(file: TensorFile) -> TensorFile:
    """Add a finding where the name promises another format than the content has."""
    promised = _PROMISES.get(file.path.suffix.lower())
    if promised is None or file.format in promised:
        return file
    finding = Finding("wrong-extension", "warning", f"the name says {file.path.suffix}, the content is {file.format}")
    return replace(file, findings=(*file.findings, finding))
