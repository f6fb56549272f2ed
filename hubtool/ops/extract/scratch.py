"""Factors on disk between decomposition and writing: memory stays small however large the adapter becomes."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from hubtool.errors import FileError
from hubtool.tensors.expr import Expr, Read
from hubtool.tensors.ref import TensorRef
from hubtool.types import Shape


class Scratch:
    """A file without a name beside the output: nothing of it is left when the process ends, however it ends.

    Tensors are appended from any thread and read through ``Expr``s while the scratch is open.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed by __exit__)
        except OSError as error:
            raise FileError(f"cannot write here: {error.strerror}", path=folder) from error
        self._path = Path(f"/dev/fd/{self._file.fileno()}")
        self._end = 0
        self._lock = threading.Lock()

    def add(self, name: str, tensor: Any, dtype: str, shape: Shape) -> Expr:
        """Keep the bytes of ``tensor``. Raises ``FileError`` (disk full)."""
        import ctypes

        flat = tensor.detach().cpu().contiguous()
        size = flat.numel() * flat.element_size()
        view = memoryview((ctypes.c_char * size).from_address(flat.data_ptr())).cast("B")
        with self._lock:
            start, self._end = self._end, self._end + size
        self._write(view, start)
        return Read(TensorRef(name, dtype, shape, self._path, start, start + size))

    def _write(self, view: memoryview, at: int) -> None:
        try:
            while view:
                count = os.pwrite(self._file.fileno(), view, at)
                view, at = view[count:], at + count
        except OSError as error:
            raise FileError(f"cannot write intermediate results: {error.strerror}", path=self._path) from error

    def __enter__(self) -> Scratch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
