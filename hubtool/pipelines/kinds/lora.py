"""Low-rank and other changes of weights, in any layout that hubtool reads."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hubtool.adapters.identity import Identity
from hubtool.formats.base import TensorFile
from hubtool.layouts import parse_file
from hubtool.pipelines.kinds import Ask, Content

STRENGTH = True
SETTINGS: Mapping[str, Any] = MappingProxyType({})


def read(file: TensorFile, identity: Identity, ask: Ask) -> Content:
    """The adapter, with canonical paths; the pipeline's family settles names that several have."""
    parsed = parse_file(file)
    if parsed.adapter.family is None and ask.family in parsed.candidates:
        parsed = parse_file(file, ask.family)
    return Content(parsed.adapter, identity.kind, token=ask.token)
