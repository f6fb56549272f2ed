"""Aliases and small closed types shared by every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["info", "warning", "error"]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something worth telling about a file: a stable code, how bad it is, and a sentence."""

    code: str
    severity: Severity
    message: str

    def to_json(self) -> dict[str, str]:
        return {"code": self.code, "severity": self.severity, "message": self.message}
