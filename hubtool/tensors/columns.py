"""A fast way through the headers that every common writer produces.

Between double quotes, an entry of a compact header always reads ``name :{ dtype : F16 , shape :[320,4], data_offsets :[0,2560]},``:
ten texts. Splitting the whole header at its quotes therefore gives ten columns that are checked and converted at C speed, faster
than ``json.loads`` alone. Offsets are not even parsed: for tensors in order they are the one text that follows from the shapes.
It accepts a subset of what ``header.parse`` accepts and reads it alike; anything else, and any name or shape worth a finding, is
None and takes the long way.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from hubtool.tensors.dtypes import BITS, numel
from hubtool.tensors.ref import TensorRef, consecutive
from hubtool.tensors.strict_json import STRICT, SURROGATE_ESCAPE
from hubtool.types import Shape

MAX_RANK = 32
_SPECIAL = ("", "__metadata__")
_OPENING = '{"__metadata__":'
_LABELS = ((2, ":{"), (3, "dtype"), (4, ":"), (6, ","), (7, "shape"), (9, "data_offsets"))
_PERIOD = 10
_SHAPE = re.compile(r":\[((?:0|[1-9][0-9]{0,17})(?:,(?:0|[1-9][0-9]{0,17}))*)?\],")
_LONG_NAME = 1024
_ABSURD = 1 << 31
_PRINTABLE = bytes(range(0x20, 0x7F))

Type = tuple[Shape, int]  # shape, bytes


def parse_columns(raw: bytes, body: int, path: Path) -> tuple[dict[str, TensorRef], dict[str, str]] | None:
    """Tensors and metadata of a compact header with plain names in the order of the data; None when it is anything else."""
    try:
        metadata, text = _split_metadata(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if "\\" in text or not text.isascii():
        return None
    tokens = text.split('"')
    count = len(tokens) // _PERIOD
    if len(tokens) != 1 + count * _PERIOD or any(tokens[i::_PERIOD].count(label) != count for i, label in _LABELS):
        return None
    names, dtypes = tokens[1::_PERIOD], tokens[5::_PERIOD]
    types = list(map(_type, dtypes, tokens[8::_PERIOD]))
    if None in types or not _ordinary(names):
        return None
    ends = list(accumulate([size for _, size in types]))  # type: ignore[misc]
    if tokens[0] or ends[-1:] != [body] or "".join(tokens[10::_PERIOD]) != _offsets(ends):
        return None
    tensors = consecutive(zip(names, dtypes, types, ends, strict=True), path, 8 + len(raw))  # type: ignore[arg-type]
    return (tensors, metadata) if len(tensors) == count and tensors.keys().isdisjoint(_SPECIAL) else None


def _ordinary(names: list[str]) -> bool:
    """Whether ASCII names are printable and not worth a finding: short, without markup, ``..`` and leading underscores."""
    text = " ".join(["", *names])
    if text.encode().translate(None, _PRINTABLE) or "<" in text:
        return False
    # rfind was measured to be four times faster than ``in`` for these
    if text.rfind("..") >= 0 or text.rfind(" __") >= 0:
        return False
    return len(text) <= _LONG_NAME or max(map(len, names)) <= _LONG_NAME


def _split_metadata(text: str) -> tuple[dict[str, str], str]:
    """(metadata, entries after it). Raises ``ValueError`` for metadata that only the long way can judge."""
    end = text.rfind("}") + 1
    if text[:1] != "{" or text[end:].strip(" "):
        raise ValueError
    if not text.startswith(_OPENING):
        return {}, text[1:end]
    metadata, start = STRICT.raw_decode(text, len(_OPENING))
    if not _plain(metadata) or SURROGATE_ESCAPE.search(text, 0, start) or text[start : start + 1] != ",":
        raise ValueError
    return metadata, text[start + 1 : end]


def _plain(metadata: Any) -> bool:
    return isinstance(metadata, dict) and all(type(value) is str for value in metadata.values())


@lru_cache(maxsize=4096)  # a LoRA has hundreds of tensors and a handful of types, the same ones as the next LoRA
def _type(dtype: str, shape: str) -> Type | None:
    match = _SHAPE.fullmatch(shape)
    if match is None or dtype not in BITS:
        return None
    sizes = tuple(map(int, match[1].split(","))) if match[1] else ()
    bits = numel(sizes) * BITS[dtype]
    if bits % 8 or len(sizes) > MAX_RANK or max(sizes, default=0) > _ABSURD:
        return None
    return sizes, bits // 8


def _offsets(ends: list[int]) -> str:
    """What the offsets of consecutive tensors look like between the quotes."""
    texts = list(map(str, ends))
    count = len(texts)
    parts = [""] * (4 * count)
    parts[0::4], parts[2::4] = ["0", *texts[:-1]], texts
    parts[1::4], parts[3::4] = [","] * count, ["]},:["] * count
    return ":[" + "".join(parts[:-1]) + "]}}"
