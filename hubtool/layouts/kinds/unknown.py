"""The last recogniser: everything else. Unknown but healthy is a state, never an error."""

from __future__ import annotations

from hubtool.adapters.identity import Identity
from hubtool.formats.base import TensorFile
from hubtool.types import Finding

ORDER = 1000
_SAMPLE = 5


def recognise(file: TensorFile) -> Identity:
    """Kind ``unknown`` with a sample of the keys, so that a person can tell what it is."""
    if not file.tensors:
        return Identity("unknown", findings=(Finding("no-tensors", "info", "there are no tensors in this file"),))
    sample = [f"{name[:80]!a} {list(ref.shape)}" for name, ref in list(file.tensors.items())[:_SAMPLE]]
    more = f" and {len(file.tensors) - _SAMPLE} more" if len(file.tensors) > _SAMPLE else ""
    return Identity(
        "unknown",
        findings=(Finding("unrecognised", "info", f"nothing known looks like this: {', '.join(sample)}{more}"),),
    )
