"""The error tree. Every class carries fields, an exit code and a machine-readable code.

    HubtoolError                        1
     +- UsageProblem                    2   the request itself makes no sense
     +- FileError                       1
     |   +- CorruptFile                 7   damaged, truncated, not what it claims to be
     |   +- UnsafeFile                  7   would run code, or abuses the parser
     |   +- UnsupportedFile             7   a container hubtool refuses by name (tar, 7z, TorchScript)
     |   +- WouldOverwrite              1
     |   +- FileMissing                 1
     +- RecognitionError                1   UnknownLayout, UnknownFamily
     +- ConversionError                 1   Unsupported, LossyConversion, ShapeMismatch, LoadMismatch
     +- RegistryError                   1   NotFound, AmbiguousRef, SchemaOutdated
     |   +- LibraryLocked               5
     +- PartialFailure                  3   some items of many failed
     +- HubError                        6
     +- MissingExtra                    1
     +- TableError                      1   developer-facing: a table of schemas/ breaks a rule

A message says what happened and where; ``hint`` names the next command. Only ``cli/`` prints and exits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class HubtoolError(Exception):
    """Base of everything hubtool raises on purpose."""

    code = "error"
    exit_code = 1

    def __init__(
        self, message: str, *, path: str | Path | None = None, offset: int | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = None if path is None else str(path)
        self.offset = offset
        self.hint = hint

    def to_json(self) -> dict[str, Any]:
        """Return the object printed under ``error`` by ``--json``."""
        fields = {"code": self.code, "message": self.message, "path": self.path, "offset": self.offset}
        return {**fields, "hint": self.hint} if self.hint else fields


class UsageProblem(HubtoolError):
    code = "usage"
    exit_code = 2


class FileError(HubtoolError):
    code = "file"


class CorruptFile(FileError):
    code = "corrupt"
    exit_code = 7


class UnsafeFile(FileError):
    code = "unsafe"
    exit_code = 7


class UnsupportedFile(FileError):
    code = "unsupported"
    exit_code = 7


class WouldOverwrite(FileError):
    code = "would-overwrite"


class FileMissing(FileError):
    code = "missing"


class RecognitionError(HubtoolError):
    code = "unrecognised"


class UnknownLayout(RecognitionError):
    code = "unknown-layout"


class UnknownFamily(RecognitionError):
    code = "unknown-family"


class ConversionError(HubtoolError):
    code = "conversion"


class Unsupported(ConversionError):
    """An adapter kind cannot follow an operation on its base weight, and says why."""

    code = "unsupported-operation"


class LossyConversion(ConversionError):
    code = "lossy"


class ShapeMismatch(ConversionError):
    code = "shape-mismatch"


class LoadMismatch(ConversionError):
    code = "load-mismatch"


class BadValues(ConversionError):
    """NaN or infinity where finite numbers are needed."""

    code = "bad-values"


class RegistryError(HubtoolError):
    code = "registry"


class NotFound(RegistryError):
    code = "not-found"


class AmbiguousRef(RegistryError):
    code = "ambiguous"


class SchemaOutdated(RegistryError):
    code = "schema-outdated"


class LibraryLocked(RegistryError):
    code = "locked"
    exit_code = 5


class PartialFailure(HubtoolError):
    code = "partial"
    exit_code = 3


class HubError(HubtoolError):
    code = "hub"
    exit_code = 6


class MissingExtra(HubtoolError):
    code = "missing-extra"

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an extra that is not installed", hint=f'pip install "hubtool[{extra}]"')


class TableError(HubtoolError):
    code = "table"
