"""A1111 and NovelAI hypernetworks: int keys (context width) -> (key network, value network), and hubtool's flat safetensors form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hubtool.adapters.hypernetwork import KEY, SETTINGS
from hubtool.adapters.identity import Identity
from hubtool.formats.base import TensorFile
from hubtool.layouts.kinds._common import scalars
from hubtool.layouts.kinds._companions import beside, present
from hubtool.tensors.ref import TensorRef
from hubtool.types import Finding

ORDER = 18
_CROSS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_TOLD = ("layer_structure", "activation_func", "is_layer_norm", "activate_output")


def recognise(file: TensorFile) -> Identity | None:
    """All tensors are linear layers of small networks that keep their width."""
    if not file.tensors or not all(KEY.fullmatch(key) for key in file.tensors):
        return None
    sizes = sorted({int(match[1]) for match in map(KEY.fullmatch, file.tensors) if match})
    families = tuple(_CROSS[size] for size in sizes if size in _CROSS)
    single = families[0] if len(families) == 1 else None
    said = settings(file)
    notes = tuple(f"{key} = {said[key]}" for key in _TOLD if key in said)
    variant = _variant(file.tensors, said)
    return Identity(
        kind="hypernetwork",
        family=single,
        family_candidates=() if single else families or ("sd1", "sd2"),
        variant=variant,
        layout="flat" if variant == "flat" else "a1111",
        components={"unet": len(file.tensors)},
        findings=(*_mismatched(file.tensors), *_optimizer(file)),
        evidence=(f"networks for context widths {', '.join(map(str, sizes))}", *notes),
    )


def settings(file: TensorFile) -> Mapping[str, Any]:
    """The fields beside the networks; structures are lists in a pickle, and JSON in hubtool's safetensors form."""
    if isinstance(file.structure, Mapping):
        return {key: item for key, item in file.structure.items() if isinstance(key, str)}
    try:
        said = json.loads(file.metadata.get(SETTINGS, "null"))
    except (ValueError, RecursionError):
        said = None
    return said if isinstance(said, Mapping) else scalars(file)


def _variant(tensors: Mapping[str, TensorRef], said: Mapping[str, object]) -> str:
    first = next(iter(tensors))
    if first.startswith("hn."):
        return "flat"
    return "a1111" if "layer_structure" in said or ".linear." in first else "novelai"


def _mismatched(tensors: Mapping[str, TensorRef]) -> list[Finding]:
    """The first layer reads vectors of the width that names the network."""
    for key, ref in tensors.items():
        match = KEY.fullmatch(key)
        first_layer = key.endswith(("linear.0.weight", "linear1.weight"))
        if match and first_layer and (len(ref.shape) != 2 or ref.shape[1] != int(match[1])):
            reason = f"{key} has shape {list(ref.shape)}; its network is for vectors {match[1]} wide"
            return [Finding("shape-contradicts", "warning", reason)]
    return []


def _optimizer(file: TensorFile) -> list[Finding]:
    found = beside(file, (f"{file.path.name}.optim",))
    return [present(found, "the optimizer's state, for training on; nothing else needs it")] if found else []
