"""One safetensors file of a plan, written in the way that suits its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from hubtool.tensors.evaluate import is_bytes
from hubtool.tensors.expr import Expr
from hubtool.tensors.progress import Progress
from hubtool.tensors.writer import write_safetensors

Late = Callable[[bytes], bytes]


def write(
    path: Path,
    tensors: Mapping[str, Expr],
    metadata: Mapping[str, str] | None = None,
    *,
    force: bool = False,
    header: bytes | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
    device: str = "cpu",
    late: Late | None = None,
) -> int:
    """One safetensors file: copied in order where every tensor is bytes of files, else by several workers."""
    if late is None and all(map(is_bytes, tensors.values())):
        return write_safetensors(path, tensors, metadata, force=force, header=header, progress=progress)
    from hubtool.tensors.parallel import write_safetensors_parallel

    return write_safetensors_parallel(
        path, tensors, metadata,
        force=force, header=header, progress=progress, workers=workers, device=device, late=late,
    )  # fmt: skip
