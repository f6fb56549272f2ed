"""The receipt of origin: what a converted file was before, kept in its header so that the way back gives the same bytes.

``hubtool.origin`` = JSON {version, layout, format, header}; ``header`` is the source's header JSON, deflated, base64. On the way back
the header is outlined like a file, which tells the key, dtype and shape that every role had; nothing else needs to be remembered.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from hubtool.adapters.ir import Adapter
from hubtool.adapters.low_rank import LowRank
from hubtool.errors import FileError
from hubtool.formats.base import TensorFile
from hubtool.layouts import peft_config
from hubtool.layouts.emission import Emission
from hubtool.layouts.emit import pack
from hubtool.layouts.outline import Outline, outline
from hubtool.layouts.peft_config import KEY as PEFT_KEY
from hubtool.tensors import expr as e
from hubtool.tensors import header
from hubtool.tensors.dtypes import nbytes, numel
from hubtool.tensors.expr import Expr, Read

KEY = "hubtool.origin"
# Claims about bytes that a conversion lays out anew; they return with the receipt.
STALE = frozenset({"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"})
_WALK = re.compile(r"\w+:\d+:rank")
_VERSION = 1
_LARGEST = 64 << 20
_LEVEL = 4  # half the time of level 6, for a fifteenth more bytes


@dataclass(frozen=True, slots=True)
class Receipt:
    """Where a file came from. ``raw`` is the source's header JSON (synthetic for sources that had none); ``families``: what it was read as."""

    layout: str
    format: str
    raw: bytes
    families: tuple[str, ...] = ()

    def dump(self) -> str:
        packed = base64.b64encode(zlib.compress(self.raw, _LEVEL)).decode()
        return json.dumps(
            {
                "version": _VERSION,
                "layout": self.layout,
                "format": self.format,
                "families": self.families,
                "header": packed,
            }
        )


def load(metadata: Mapping[str, str]) -> Receipt | None:
    """The receipt in a file's metadata; None when there is none that can be read (it is a convenience, never trusted)."""
    try:
        document = json.loads(metadata.get(KEY, ""))
        if document["version"] != _VERSION:
            return None
        packed = base64.b64decode(document["header"], validate=True)
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(packed, _LARGEST)
        if unpacker.unconsumed_tail:
            return None
        families = tuple(map(str, document.get("families", ())))
        return Receipt(str(document["layout"]), str(document["format"]), raw, families)
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error, zlib.error):
        return None


def of_file(file: TensorFile, layout: str, families: tuple[str, ...] = ()) -> Receipt:
    """The receipt for a source read as one of ``families``: the one it carries itself, else one made from its own header."""
    carried = load(file.metadata)
    if carried is not None:
        return carried
    raw = file.header_bytes
    if raw is None:
        entries = ((name, t.dtype, t.shape, t.nbytes) for name, t in file.tensors.items())
        raw = header.serialise(entries, dict(file.metadata))
    return Receipt(layout, file.format, raw, families)


def carried_metadata(metadata: Mapping[str, str], *without: str) -> dict[str, str]:
    """What of a source's metadata travels: everything but stale hashes, the receipt, and what belongs to one layout."""
    dropped = STALE | {KEY, PEFT_KEY, *without}
    return {key: value for key, value in metadata.items() if key not in dropped and not _positional(key, value)}


def _positional(key: str, value: str) -> bool:
    """What a safeloras header says about its own positions (classes, ranks, tokens); it means nothing beside names."""
    return (
        bool(_WALK.fullmatch(key)) or value == "<embed>" or (key in ("unet", "text_encoder") and value.startswith("["))
    )


class Restored(NamedTuple):
    """The origin's tensors in its order. ``raw``: its exact header when the metadata is untouched too, else None and ``metadata``."""

    tensors: dict[str, Expr]
    raw: bytes | None
    metadata: dict[str, str]


def restore(receipt: Receipt, adapter: Adapter, emission: Emission) -> Restored | None:
    """Undo a conversion: give every tensor of ``emission`` the key, dtype, shape and place it had. None when anything does not fit."""
    origin = _header(receipt)
    if origin is None or emission.losses or emission.rounded:
        return None
    shape = outline(origin.tensors, Path("origin"), family=adapter.family, metadata=origin.metadata)
    if shape is None or not _same_modules(shape, emission) or not _same_scales(origin, shape, emission):
        return None
    wanted = {key: row for row, key in shape.keys().items()}
    spare: dict[str, Expr] = {key: Read(ref) for key, ref in adapter.extras.items()}
    spare |= {item.token: item.vectors for item in adapter.embeddings if item.token}
    tensors: dict[str, Expr] = {}
    for key, ref in origin.tensors.items():
        tensor = _again(wanted[key], emission, ref.dtype, ref.shape) if key in wanted else spare.pop(key, None)
        if tensor is None or tensor.dtype != ref.dtype or numel(tensor.shape) != numel(ref.shape):
            return None
        tensors[key] = e.reshape(tensor, ref.shape)
    return None if spare else _with_metadata(tensors, origin, adapter)


def _header(receipt: Receipt) -> header.Header | None:
    """The kept header, checked as strictly as a file's; the body it claims is the one it needs."""
    try:
        document = json.loads(receipt.raw)
        sizes = (nbytes(t["dtype"], tuple(t["shape"])) for name, t in document.items() if name != header.METADATA)
        return header.parse(receipt.raw, sum(sizes), Path("origin"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, FileError):
        return None


def _same_modules(shape: Outline, emission: Emission) -> bool:
    """The same roles on both sides, alphas apart: they may live in metadata on one side."""
    then, now = ({row for row in rows if row[2] != "alpha"} for rows in (shape.keys(), emission.roles))
    return then == now


def _same_scales(origin: header.Header, shape: Outline, emission: Emission) -> bool:
    """Where the origin had no alpha tensor, its configuration (or the rule alpha = rank) gives the scale the adapter has now."""
    configs = {c: peft_config.of_component(origin.metadata, c) for c, _ in shape.modules}
    for (component, path), draft in shape.modules.items():
        patch = emission.patches.get((component, path))
        if "alpha" in draft.keys or not isinstance(patch, LowRank):
            continue
        alpha = configs[component].alpha_of(draft.stem) if shape.syntax.alpha == "metadata" else None
        then = replace(
            patch, alpha_value=alpha, rank_stabilised=configs[component].rank_stabilised and alpha is not None
        )
        if then.scale != patch.scale:
            return False
    return True


def _again(row: tuple[str, str, str], emission: Emission, dtype: str, shape: tuple[int, ...]) -> Expr | None:
    component, path, role = row
    if role != "alpha":
        return emission.tensors[emission.roles[row]]
    patch = emission.patches[component, path]
    stored = dict(patch.roles()).get("alpha")
    if stored is not None and stored.dtype == dtype:
        return stored
    return None if patch.alpha_value is None else pack(patch.alpha_value, dtype, shape)


def _with_metadata(tensors: dict[str, Expr], origin: header.Header, adapter: Adapter) -> Restored:
    """Untouched metadata gives the origin's very header; edits made in between win over what the origin said."""
    now, then = (carried_metadata(text, "format") for text in (adapter.metadata, origin.metadata))
    if now == then:
        return Restored(tensors, origin.raw, origin.metadata)
    kept = {key: value for key, value in origin.metadata.items() if key not in then and key not in STALE}
    return Restored(tensors, None, kept | now)
