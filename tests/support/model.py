"""One entry of the registry of models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Model:
    """How to build a model.

    ``builder`` is ``library:Class``; ``prefix`` is put before every name where hub files have one that the class has not;
    ``note`` says where the configuration is from when it is not the published one.
    """

    builder: str
    config: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    note: str = ""
