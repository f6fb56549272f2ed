"""``--repair`` mends keys that were broken by hand; ``--layout origin`` leads back to whatever a file was, broken names included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType
from typing import TypeAlias

from hubtool.errors import ConversionError, CorruptFile
from hubtool.formats.base import TensorFile
from hubtool.layouts import receipt as receipts
from hubtool.layouts import repair as repairs
from hubtool.layouts import repair_receipt
from hubtool.layouts.parse import Parsed, recognise
from hubtool.layouts.unwrap import unwrapped
from hubtool.ops import adapters
from hubtool.ops.plan import Plan
from hubtool.ops.target import Target

Convert: TypeAlias = Callable[[TensorFile, Target], Plan]  # the conversion of a healthy file


def plan(file: TensorFile, target: Target, convert: Convert) -> Plan:
    """The conversion of the mended file. Its receipt remembers the broken header, so that ``--layout origin`` gives the same bytes.

    A healthy file is converted as it is. Raises ``ConversionError`` where keys mean nothing and no known repair helps.
    """
    found = repairs.propose(unwrapped(file)[0], file.path)
    if found is None:
        _refuse_unknown(file, target)
        made = convert(file, target)
        return replace(made, notes=(*made.notes, "nothing to repair: no key is broken in a way we know"))
    mended = replace(repairs.apply(file, found), header_bytes=None)
    made = replace(convert(mended, target), repair=found)
    if made.format == "torch-zip":
        return made
    origin = repair_receipt.of_broken(file, made.layout or "", found.candidates)
    return replace(made, header=None, metadata={**made.metadata, receipts.KEY: origin.dump()})


def _refuse_unknown(file: TensorFile, target: Target) -> None:
    try:
        parsed = recognise(file, target.family)
    except CorruptFile as error:
        error.hint = error.hint or "no known repair mends this"
        raise
    if parsed is None:
        raise ConversionError(
            "no key of this file means anything, and no known repair helps",
            path=file.path,
            hint=f"hubtool explain {file.path}",
        )


def back(file: TensorFile, parsed: Parsed, target: Target, convert: Convert) -> Plan:
    """Undo the conversion that the file's receipt remembers. Raises ``ConversionError`` without a receipt, or where the adapter was changed since."""
    receipt = receipts.load(file.metadata)
    if receipt is None:
        raise ConversionError("this file has no receipt of origin", path=file.path, hint="name a layout instead")
    broken = repair_receipt.mend(receipt)
    if broken is None:
        return convert(file, replace(target, layout=receipt.layout))
    emission = adapters.spelled(parsed.adapter, broken.receipt.layout, parsed, target.family)
    restored = receipts.restore(broken.receipt, parsed.adapter, emission)
    if restored is None:
        raise ConversionError(
            "the adapter was changed since it was repaired, so its broken original cannot be given back",
            path=file.path,
            hint=f"--layout {broken.receipt.layout} writes it in good spelling",
        )
    old = {new: key for key, new in broken.renames.items()}
    tensors = {old.get(name, name): tensor for name, tensor in restored.tensors.items()}
    exact = restored.raw is not None
    return replace(
        adapters.restored_plan(file, emission, restored),
        tensors=MappingProxyType(tensors),
        layout=repair_receipt.BROKEN,
        header=receipt.raw if exact else None,
    )
