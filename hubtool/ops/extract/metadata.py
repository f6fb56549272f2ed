"""What the output says about itself in the words of the trainers: sd-scripts' ``ss_*`` and Stability AI's ModelSpec.

No dates: equal inputs give equal bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from hubtool.layouts import tables
from hubtool.ops.extract.report import Module
from hubtool.ops.sides import Side
from hubtool.types import Shape


def describe(base: Side, tuned: Side, modules: Sequence[Module], dtype: str) -> dict[str, str]:
    """Metadata of an extracted adapter."""
    claims = tables.family(base.family).claims
    architecture = next((claim for claim in claims if "_" not in claim), base.family)
    known = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": f"{tuned.file.path.stem} extracted",
        "ss_base_model_version": claims[0] if claims else base.family,
        "ss_sd_model_name": base.file.path.name,
        "ss_training_comment": f"extracted from {base.file.path.name} and {tuned.file.path.name} by hubtool",
        "ss_mixed_precision": dtype,
    }
    return known | (_network(modules) if modules else {})


def _network(modules: Sequence[Module]) -> dict[str, str]:
    """Ranks as sd-scripts states them; where modules differ its word is ``Dynamic``. alpha is always the rank."""
    plain, conv = ([one.rank for one in modules if _convolution(one.shape) is is_conv] for is_conv in (False, True))
    rank = _stated(plain or conv)
    known = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}
    if plain and conv:
        args = {"conv_dim": _stated(conv), "conv_alpha": _stated(conv)}
        known["ss_network_args"] = json.dumps(args, sort_keys=True)
    return known


def _convolution(shape: Shape) -> bool:
    return len(shape) > 2 and max(shape[2:]) > 1


def _stated(ranks: Sequence[int]) -> str:
    """The rank that (nearly) all share: a narrow module cannot have more ranks than rows."""
    rank, count = Counter(ranks).most_common(1)[0]
    return str(rank) if 2 * count > len(ranks) and rank == max(ranks) else "Dynamic"
