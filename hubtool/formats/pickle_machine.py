"""A static stack machine for pickles, protocols 0 to 5: nothing is imported, resolved or called but functions of our own.

A global that is not in ``pickle_globals.ALLOWED`` is an ``UnsafeFile``; the verdict falls when the whole stream has been read, so
a payload followed by garbage is still named. Opcodes that only serve to run code, or that no torch file has ever needed (INST, OBJ,
NEWOBJ_EX, EXT*, PERSID, out-of-band buffers), are refused. Sources: CPython's ``pickletools`` for the opcodes, spec/security 5.2
for the policy.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, NoReturn

from hubtool.errors import CorruptFile, FileError, UnsafeFile
from hubtool.formats.pickle_opcodes import HANDLERS, REFUSED
from hubtool.formats.pickle_state import MAX_OPCODES, Machine, Truncated
from hubtool.formats.torch_objects import Storage

_MALFORMED = (IndexError, KeyError, ValueError, TypeError, OverflowError, struct.error)


@dataclass(frozen=True, slots=True)
class Parsed:
    """Result of one stream: the object, where the stream ended, storages by key, known-inert names and duplicate keys met."""

    value: Any
    end: int
    storages: dict[str, Storage]
    inert: tuple[str, ...]
    duplicates: tuple[str, ...]


def run(data: bytes, start: int = 0, base: int = 0, *, more: bool = False) -> Parsed:
    """Read the one pickle that begins at ``data[start]``. Offsets in errors count from ``base`` (where ``data`` lies in its file).

    ``more`` says that the file goes on after ``data``: then ``Truncated`` is raised before any verdict, so that the caller can come
    back with more. Raises ``UnsafeFile``, ``UnsupportedFile`` or ``CorruptFile``.
    """
    machine = Machine(data)
    try:
        end = _loop(machine, start)
    except FileError as error:
        if not (more and isinstance(error, Truncated)):
            _verdict(machine, base, error)
        raise
    _verdict(machine, base, None)
    if len(machine.stack) != 1 or machine.marks:
        raise CorruptFile("the pickle leaves a mess on its stack", offset=base + end)
    return Parsed(machine.stack[0], end, machine.storages, tuple(machine.inert), tuple(machine.duplicates))


def _loop(machine: Machine, start: int) -> int:
    """Execute opcodes until STOP and return the position after it."""
    data, pos, at, table = machine.data, start, start, HANDLERS
    try:
        for _ in range(MAX_OPCODES):
            at = pos
            opcode = data[pos]
            if opcode == 46:  # STOP
                return pos + 1
            handler = table[opcode]
            if handler is None:
                _refuse_opcode(opcode, at)
            pos = handler(machine, pos + 1)
    except FileError as error:
        error.offset = at
        raise
    except _MALFORMED as error:
        kind = Truncated if pos >= len(data) or at + 9 > len(data) else CorruptFile
        raise kind(f"the pickle is broken ({type(error).__name__})", offset=at) from error
    raise UnsafeFile(f"the pickle has more than {MAX_OPCODES} opcodes", offset=pos)


def _refuse_opcode(opcode: int, at: int) -> NoReturn:
    if opcode in REFUSED:
        raise UnsafeFile(f"the pickle uses {REFUSED[opcode]}, which no torch file needs", offset=at)
    raise CorruptFile(f"0x{opcode:02x} is not a pickle opcode", offset=at)


def _verdict(machine: Machine, base: int, error: FileError | None) -> None:
    """Unknown globals outweigh whatever else is wrong with the stream."""
    if machine.unknown:
        (first, offset), *rest = machine.unknown.items()
        others = f" (and {len(rest)} more names)" if rest else ""
        raise UnsafeFile(f"the pickle names {first}{others}", offset=base + offset, hint=_hint(first)) from error
    if error is not None and error.offset is not None:
        error.offset += base


_HINTS = {
    "transformers.": "these are training arguments, not weights", "accelerate.": "this is trainer state, not weights",
    "torch.optim.": "this is an optimizer, not weights",
}  # fmt: skip


def _hint(name: str) -> str:
    known = (text for prefix, text in _HINTS.items() if name.startswith(prefix))
    return next(known, "hubtool never runs pickles; ask the author for a safetensors file")
