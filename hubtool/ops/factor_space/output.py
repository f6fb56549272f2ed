"""The merged adapter, and the plan of the file that holds it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from hubtool.adapters.fusing import same
from hubtool.adapters.ir import Adapter, Embedding, ModuleKey, Patch
from hubtool.adapters.low_rank import LowRank
from hubtool.layouts.emission import Emission, Loss
from hubtool.layouts.receipt import carried_metadata
from hubtool.ops.adapters import container_of
from hubtool.ops.containers import config_losses
from hubtool.ops.factor_space import terms
from hubtool.ops.factor_space.report import Report
from hubtool.ops.plan import Plan
from hubtool.tensors.dtypes import BITS, FLOATS
from hubtool.tensors.evaluate import is_bytes
from hubtool.tensors.expr import Expr
from hubtool.tensors.ref import TensorRef

_WHY = {
    "exact": "factors side by side, every rank kept",
    "truncated": "the best approximation of its rank",
    "summed": "whole differences, summed",
}


def adapter(
    adapters: Sequence[Adapter], patches: Mapping[ModuleKey, Patch], family: str | None, report: Report
) -> Adapter:
    """All patches, and what the inputs have beside them: token vectors, and tensors that nobody understands."""
    extras: dict[str, TensorRef] = {}
    for adapter in adapters:
        again = extras.keys() & adapter.extras.keys()
        report.notes += [f"{key} is not understood; the first input's is kept" for key in sorted(again)]
        extras = {**adapter.extras, **extras}
    return Adapter(
        family=family,
        patches=MappingProxyType(dict(patches)),
        embeddings=_embeddings(adapters, report),
        extras=MappingProxyType(extras),
        metadata=adapters[0].metadata if len(adapters) == 1 else MappingProxyType({}),
    )


def _embeddings(adapters: Sequence[Adapter], report: Report) -> tuple[Embedding, ...]:
    """Token vectors are learned words, not changes: all are kept, of one token's the first input's."""
    found: dict[tuple[str | None, str | None], Embedding] = {}
    for one in (one for adapter in adapters for one in adapter.embeddings):
        known = found.setdefault((one.token, one.encoder), one)
        if known is not one and not same(known.vectors, one.vectors):
            report.notes.append(f"token {one.token}: the first input's vectors are kept")
    return tuple(found.values())


def plan(
    source: Path, merged: Adapter, emission: Emission, report: Report, container: str | None, dtype: str | None
) -> Plan:
    """The file that holds ``merged``, spelled as ``emission``. ``container``: what was asked for; ``dtype``: of copied tensors, too."""
    container = container_of(emission, container)
    losses: tuple[Loss, ...] = tuple(emission.losses)
    if emission.config and container != "peft-folder":
        losses += tuple(config_losses(emission.patches, {}))
    metadata = {**carried_metadata(merged.metadata), **emission.metadata, **_network(emission)}
    tensors = {key: _cast(key, tensor, dtype) for key, tensor in emission.tensors.items()}
    return Plan(
        source=source,
        format=container,
        layout=str(emission.layout),
        tensors=tensors,
        metadata=metadata if container != "torch-zip" else {},
        tree=list(tensors.values()) if emission.container == "torch-list" else None,
        config=emission.config if container == "peft-folder" else None,
        losses=losses,
        notes=(*emission.notes, *report.notes),
        rounded={**emission.rounded, **_rounded(report)},
    )


def _rounded(report: Report) -> dict[str, str]:
    """Why numbers are not an input's own."""
    counts = Counter(one.how for one in report.modules.values() if one.how in _WHY)
    cast = {f"{len(report.cast)} modules (copied)": f"cast to {report.dtype}"} if report.cast else {}
    return {f"{count} modules ({how})": _WHY[how] for how, count in counts.items()} | cast


def _network(emission: Emission) -> dict[str, str]:
    """What sd-scripts' readers look up: rank and alpha of the network, as resize_lora.py writes them ("Dynamic" for several)."""
    if emission.layout.syntax != "kohya":
        return {}
    patches = [patch for patch in emission.patches.values() if isinstance(patch, LowRank)]
    if not patches:
        return {}
    found = {patch.rank for patch in patches}, {patch.scale * patch.rank for patch in patches}
    dim, alpha = (f"{min(one):g}" if len(one) == 1 else "Dynamic" for one in found)
    convolutions = any(patch.algorithm == "locon" for patch in patches)
    arguments = {"ss_network_args": json.dumps({"conv_dim": dim, "conv_alpha": alpha})} if convolutions else {}
    return {"ss_network_module": "networks.lora", "ss_network_dim": dim, "ss_network_alpha": alpha, **arguments}


def _cast(key: str, tensor: Expr, dtype: str | None) -> Expr:
    """A copied tensor in the wanted dtype, its own when None, so that NaN is refused on the way; alphas stay."""
    if tensor.dtype not in FLOATS or not tensor.shape or key.endswith("alpha"):
        return tensor
    copied = is_bytes(tensor) and BITS[tensor.dtype] >= 16
    return terms.cast(tensor, dtype or tensor.dtype) if copied or dtype not in (None, tensor.dtype) else tensor
