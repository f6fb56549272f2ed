"""Hypernetworks in a pipeline: k = to_k(x + strength * N_k(x)), v = to_v(x + strength * N_v(x)), x being what attention reads.

Nets of the cross-attention's width act there, nets of a channel width in the self-attention of the blocks that have it. Several act one
after another, in order of loading; LoRA factors of ``to_k`` and ``to_v`` read the changed x, as everything behind it does. Dropout
belongs to training; activations and normalisation are the file's. Facts: spec/artefacts.md F.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from hubtool.adapters.hypernetwork import Hypernetwork, Network, after, parse, run
from hubtool.adapters.identity import Identity
from hubtool.adapters.ir import Adapter
from hubtool.errors import BadValues, LoadMismatch, Unsupported
from hubtool.formats.base import TensorFile
from hubtool.layouts.kinds.hypernetwork import settings
from hubtool.layouts.unwrap import unwrapped
from hubtool.pipelines import live
from hubtool.pipelines.families import family_of
from hubtool.pipelines.kinds import Ask, Content, Strengths, _attention
from hubtool.types import Finding

STRENGTH = True
SETTINGS: Mapping[str, Any] = MappingProxyType({})
_MODEL = "unet"


def read(file: TensorFile, identity: Identity, ask: Ask) -> Content:
    """The networks, their weights in memory. Raises ``CorruptFile``, ``BadValues``, ``Unsupported`` for an unknown activation."""
    nets = parse(unwrapped(file)[0], settings(file))
    families = (identity.family,) if identity.family else identity.family_candidates
    adapter = Adapter(identity.family, {}, findings=identity.findings)
    return Content(adapter, identity.kind, Effect(_chains(nets), families), token=ask.token)


@dataclass(slots=True, eq=False)
class Chain:
    """One network ready to run; ``moved``: its layers where and as the last x was."""

    network: Network
    held: list[tuple[Any, Any]]
    active: Any
    moved: tuple[Any, list[tuple[Any, Any]]] | None = None

    def __call__(self, x: Any) -> Any:
        place = x.device, x.dtype
        if self.moved is None or self.moved[0] != place:
            self.moved = place, self._moved(*place)
        return run(self.network, self.moved[1], self.active, x)

    def _moved(self, device: Any, dtype: Any) -> list[tuple[Any, Any]]:
        import torch

        with torch.inference_mode(False):  # these tensors outlive the run, and must be fit for a backward pass
            if self.active is not None:
                self.active.to(device, dtype)
            return [(one.to(device, dtype), None if two is None else two.to(device, dtype)) for one, two in self.held]


@dataclass(slots=True)
class Gate:
    """The strength of one network in front of one projection, by step: a ``composition.Slot``."""

    entry: _attention.Entry
    path: str
    states: tuple[tuple[float, ...], ...]
    kept: float = field(init=False)

    def __post_init__(self) -> None:
        self.kept = self.entry.strengths[self.path]

    def put(self, step: int) -> None:
        self.entry.strengths[self.path] = self.states[step][0]

    def restore(self) -> None:
        self.entry.strengths[self.path] = self.kept


@dataclass(frozen=True, slots=True)
class Effect:
    """``chains``: (context width, side) -> network. ``families``: those that the widths are of."""

    chains: Mapping[tuple[int, str], Chain]
    families: tuple[str, ...]
    components = (_MODEL,)

    def check(self, pipe: Any, strength: float) -> None:
        """Raises ``LoadMismatch`` for another family and for widths that the pipeline's attention does not read."""
        model, family = live.modules(pipe).get(_MODEL), family_of(pipe)
        found = [] if model is None else list(_attention.attentions(model))
        if not found:
            raise LoadMismatch(f"this {type(pipe).__name__} has no U-Net with the attention that hypernetworks act on")
        if self.families and family and family not in self.families:
            raise LoadMismatch(f"the hypernetwork is for {' or '.join(self.families)}, the pipeline is {family}")
        have = sorted({_attention.width(module) for _, module in found})
        absent = sorted({width for width, _ in self.chains} - {*have})
        if absent:
            said = f"networks for {_listed(absent)} wide vectors; the attention of this pipeline reads {_listed(have)}"
            raise LoadMismatch(said)
        if any(getattr(module, "fused_projections", False) for _, module in found):
            hint = "pipe.unfuse_qkv_projections() first"
            raise Unsupported("with fused projections nothing can stand before keys and values", hint=hint)

    def attach(self, pipe: Any, name: str, strength: float) -> Mapping[str, tuple[str, ...]]:
        return {_MODEL: _attention.push(live.modules(pipe)[_MODEL], name, self.chains, strength)}

    def detach(self, pipe: Any, name: str) -> None:
        _attention.pop(live.modules(pipe)[_MODEL], name)

    def findings(self, pipe: Any) -> Iterator[Finding]:
        widths = sorted({width for width, _ in self.chains})
        said = f"networks for {_listed(widths)} wide vectors act before keys and values; no weight is changed"
        yield Finding("hypernetwork", "info", said)

    def slots(self, pipe: Any, name: str, strengths: Strengths) -> Iterator[Gate]:
        entry = _attention.entry(live.modules(pipe)[_MODEL], name)
        for path in entry.strengths:
            yield Gate(entry, path, tuple((value,) for value in strengths(_MODEL, path)))


def _chains(nets: Hypernetwork) -> dict[tuple[int, str], Chain]:
    return {at: Chain(net, _held(net), after(net)) for at, net in nets.networks.items()}


def _held(network: Network) -> list[tuple[Any, Any]]:
    """Every layer's tensors in memory: the file may be gone when the pipeline runs."""
    from hubtool.tensors.evaluate import compute

    held = []
    for layer in network.layers:
        pair = tuple(None if one is None else compute(one).clone() for one in (layer.weight, layer.bias))
        if not all(bool(one.isfinite().all()) for one in pair if one is not None):
            raise BadValues(f"layer {layer.index} of {network.width}.{network.side} holds NaN or infinity")
        held.append((pair[0], pair[1]))
    return held


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
