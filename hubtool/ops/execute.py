"""Runs a plan: the output appears whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hubtool.errors import ConversionError, UsageProblem
from hubtool.formats.base import TensorFile
from hubtool.layouts.receipt import KEY as RECEIPT
from hubtool.ops.plan import Plan
from hubtool.ops.weights_file import Late, write
from hubtool.tensors import header
from hubtool.tensors.device import check_device
from hubtool.tensors.expr import Read, Reshape
from hubtool.tensors.progress import Progress, expect
from hubtool.tensors.ref import TensorRef
from hubtool.tensors.writer import atomic_folder, rewrite_header_in_place, same_file


def execute(
    plan: Plan,
    output: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
    workers: int | None = None,
    device: str = "cpu",
    late: Late | None = None,
) -> int:
    """Write the plan to ``output`` and return the bytes written. Raises ``WouldOverwrite``, ``FileError``, ``UsageProblem``.

    ``workers`` and ``device`` are for tensors that have to be computed, see ``hubtool.tensors.parallel``; ``late`` completes the header (or
    the documents of a folder) when the tensors are written, keeping its length.
    """
    if output.exists() and same_file(output, plan.source):
        raise UsageProblem("the output is the input", path=output, hint="choose another name, or --in-place")
    check_device(device)
    expect(progress, plan.bytes_out)
    if type(plan) is not Plan:
        return _execute_special(plan, output, force, progress=progress, workers=workers, device=device, late=late)
    if plan.format == "peft-folder":
        return _peft_folder(plan, output, progress=progress, workers=workers, device=device, late=late)
    if plan.format == "torch-zip":
        from hubtool.formats.torch_writer import write_torch_zip

        tree = plan.tree if plan.tree is not None else dict(plan.tensors)
        return write_torch_zip(
            output, tree, force=force, root=_root(output), workers=workers, device=device, progress=progress
        )
    return write(
        output, plan.tensors, dict(plan.metadata) or None,
        force=force, header=plan.header, progress=progress, workers=workers, device=device, late=late,
    )  # fmt: skip


def _execute_special(plan: Plan, output: Path, force: bool, **how: Any) -> int:
    """Plans that are more than one file of tensors; their modules are imported only here."""
    from hubtool.ops.artefacts._image import Restored
    from hubtool.ops.execute_folder import execute_folder
    from hubtool.ops.folder_plan import FolderPlan

    if isinstance(plan, FolderPlan):
        return execute_folder(plan, output, **how)
    assert isinstance(plan, Restored), type(plan)
    return plan.write(output, force=force)


def _root(output: Path) -> str:
    """torch names the archive's folder after the file; anything unusual becomes ``archive``, as torch itself does for streams."""
    stem = output.stem
    return (
        stem if stem.isascii() and stem.isprintable() and stem.strip(".") and not set(stem) & set("/\\:") else "archive"
    )


def _peft_folder(plan: Plan, output: Path, **how: Any) -> int:
    with atomic_folder(output) as part:
        text = json.dumps(plan.config, indent=2, sort_keys=True) + "\n"
        (part / "adapter_config.json").write_text(text, encoding="utf-8")
        name = part / "adapter_model.safetensors"
        return write(name, plan.tensors, dict(plan.metadata) or None, **how)


def execute_in_place(plan: Plan, file: TensorFile) -> int:
    """Rewrite only the header of ``file`` when the plan renames its tensors and nothing else; returns the header's bytes.

    Raises ``ConversionError`` with the reason where more than the header would change.
    """
    if plan.format != "safetensors" or file.format != "safetensors":
        raise ConversionError("only a safetensors file can be renamed in place", path=file.path)
    places = {ref.start: (key, expr.shape, ref) for key, expr in plan.tensors.items() for ref in [_whole(expr)] if ref}
    own = {ref.start: ref for ref in file.tensors.values() if ref.start < ref.end}
    if len(places) != len(plan.tensors) or {s: p[2].end for s, p in places.items()} != {
        s: r.end for s, r in own.items()
    }:
        raise ConversionError(
            "this conversion changes more than names", path=file.path, hint="write a new file with -o"
        )
    rows = ((key, ref.dtype, shape, ref.nbytes) for _, (key, shape, ref) in sorted(places.items()))
    # the data stays where it is, so what the file says about it stays true; a receipt would only take room
    metadata = {**file.metadata, **{key: value for key, value in plan.metadata.items() if key != RECEIPT}}
    text = header.serialise(rows, metadata or None).rstrip(b" ")
    if not rewrite_header_in_place(file.path, text):
        raise ConversionError(
            f"the new header takes {len(text)} bytes, the file has room for {len(file.header_bytes or b'')}",
            path=file.path,
            hint="write a new file with -o",
        )
    return os.stat(file.path).st_size


def _whole(expr: object) -> TensorRef | None:
    """The reference whose bytes an expression is, unchanged."""
    if isinstance(expr, Reshape):
        expr = expr.source
    return expr.ref if isinstance(expr, Read) and expr.ref.contiguous else None
