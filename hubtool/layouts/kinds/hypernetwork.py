"""A1111 and NovelAI hypernetworks: int keys (context width) -> (key network, value network), and hubtool's flat safetensors form."""

from __future__ import annotations

import re
from collections.abc import Mapping

from hubtool.adapters.identity import Identity
from hubtool.formats.base import TensorFile
from hubtool.layouts.kinds._common import scalars
from hubtool.tensors.ref import TensorRef
from hubtool.types import Finding

ORDER = 18
# 768.0.linear.0.weight (pickle), 768.0.linear1.weight (NovelAI), hn.768.k.linear.0.weight (flat)
_KEY = re.compile(r"(?:hn\.)?(\d+)\.([01kv])\.linear(?:\d|\.\d+)\.(?:weight|bias)$")
_CROSS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}


def recognise(file: TensorFile) -> Identity | None:
    """All tensors are linear layers of small networks that keep their width."""
    if not file.tensors or not all(_KEY.match(key) for key in file.tensors):
        return None
    sizes = sorted({int(match.group(1)) for match in map(_KEY.match, file.tensors) if match})
    families = tuple(_CROSS[size] for size in sizes if size in _CROSS)
    single = families[0] if len(families) == 1 else None
    said = scalars(file)
    notes = tuple(
        f"{key} = {said[key]}" for key in ("activation_func", "is_layer_norm", "activate_output") if key in said
    )
    return Identity(
        kind="hypernetwork",
        family=single,
        family_candidates=() if single else families or ("sd1", "sd2"),
        variant=_variant(file.tensors, said),
        components={"unet": len(file.tensors)},
        findings=tuple(_mismatched(file.tensors)),
        evidence=(f"networks for context widths {', '.join(map(str, sizes))}", *notes),
    )


def _variant(tensors: Mapping[str, TensorRef], said: Mapping[str, object]) -> str:
    first = next(iter(tensors))
    if first.startswith("hn."):
        return "flat"
    return "a1111" if "layer_structure" in said or ".linear." in first else "novelai"


def _mismatched(tensors: Mapping[str, TensorRef]) -> list[Finding]:
    """The first layer reads vectors of the width that names the network."""
    for key, ref in tensors.items():
        match = _KEY.match(key)
        first_layer = key.endswith(("linear.0.weight", "linear1.weight"))
        if match and first_layer and (len(ref.shape) != 2 or ref.shape[1] != int(match.group(1))):
            reason = f"{key} has shape {list(ref.shape)}; its network is for vectors {match.group(1)} wide"
            return [Finding("shape-contradicts", "warning", reason)]
    return []
