"""What the conversions of several artefacts share: fields that only a pickle can hold, and the two containers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hubtool.errors import UsageProblem
from hubtool.formats.base import TensorFile
from hubtool.layouts.emission import Loss
from hubtool.ops.artefacts._image import KEY as IMAGE
from hubtool.ops.plan import Plan
from hubtool.tensors.expr import Expr
from hubtool.tensors.ref import TensorRef

if TYPE_CHECKING:
    from hubtool.ops.target import Target

EXTRA = "hubtool.extra."
_PLAIN = (str, int, float, bool, type(None))


def to_torch(target: Target) -> bool:
    """Whether a torch file is asked for; anything but safetensors and torch is refused."""
    if target.format not in (None, "safetensors", "torch-zip"):
        raise UsageProblem(f"this kind has no form in a {target.format}", hint="name the output .safetensors or .pt")
    return target.format == "torch-zip"


def fields(file: TensorFile) -> dict[str, Any]:
    """Top-level values beside the tensors: of a pickle itself, or kept in the metadata as ``hubtool.extra.*``."""
    if isinstance(file.structure, Mapping):
        return {str(key): value for key, value in file.structure.items() if not has_tensor(value)}
    return {key.removeprefix(EXTRA): value(text) for key, text in file.metadata.items() if key.startswith(EXTRA)}


def has_tensor(item: Any) -> bool:
    """Whether a tensor lies in a value of a pickle."""
    if isinstance(item, Mapping):
        return any(map(has_tensor, item.values()))
    return any(map(has_tensor, item)) if isinstance(item, list | tuple) else isinstance(item, TensorRef)


def value(text: str) -> Any:
    """What a metadata entry written as JSON says; the text itself where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def as_json(item: Any) -> str | None:
    """JSON of a value that comes back the same (tuples as lists); None where JSON has no word for it."""
    return json.dumps(item, ensure_ascii=False) if _plain(item) else None


def _plain(item: Any) -> bool:
    if isinstance(item, Mapping):
        return all(isinstance(key, str) and _plain(inner) for key, inner in item.items())
    return all(map(_plain, item)) if isinstance(item, list | tuple) else isinstance(item, _PLAIN)


def as_metadata(values: Mapping[str, Any]) -> tuple[dict[str, str], tuple[Loss, ...]]:
    """Fields as ``hubtool.extra.*`` entries, and a loss for each that JSON cannot say."""
    texts = {name: as_json(item) for name, item in values.items()}
    kept = {EXTRA + name: text for name, text in texts.items() if text is not None}
    return kept, tuple(Loss(f"field {name}", "JSON has no word for it") for name, text in texts.items() if text is None)


def carried(file: TensorFile) -> dict[str, str]:
    """What of a file's own metadata goes into another safetensors file of the same artefact."""
    if not file.header_bytes:
        return {}
    return {key: text for key, text in file.metadata.items() if key not in ("format", IMAGE)}


def metadata_losses(file: TensorFile, used: Iterable[str] = ()) -> Iterator[Loss]:
    """Metadata that a torch file has no place for: everything but what hubtool itself wrote and ``used``."""
    if not file.header_bytes:
        return
    for key, text in file.metadata.items():
        own = key in (IMAGE, *used) or key.startswith(EXTRA) or (key, text) == ("format", "pt")
        if not own:
            yield Loss(f"metadata {key}", "a torch file has no place for metadata")


def unchanged(file: TensorFile, tensors: Mapping[str, Expr], layout: str | None) -> Plan:
    """The same names in a safetensors file; the very same file when it is one already."""
    same = file.format == "safetensors"
    metadata = dict(file.metadata) if same else {"format": "pt"}
    return Plan(file.path, "safetensors", layout, tensors, metadata, header=file.header_bytes if same else None)


def leaves(tree: dict[str, Any] | Expr) -> dict[str, Expr]:
    """The tensors of a written embedding by key, whatever its object is: a dict, A1111's dicts in a dict, one bare tensor."""
    if not isinstance(tree, dict):
        return {"0": tree}
    held = tree.get("string_to_param", tree)
    return {key: item for key, item in held.items() if isinstance(item, Expr)}
