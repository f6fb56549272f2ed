"""Hypernetworks (A1111, NovelAI): small networks in front of attention's keys and values, one pair per context width.

For every attention whose context x is as wide as a pair's number, with strength m and before ``to_k`` / ``to_v``:

    key_in = x + m * N_key(x)        value_in = x + m * N_value(x)

N is a chain of linear layers (the layer structure's multiples of the width), each followed by the activation, a layer normalisation
and a dropout where the file asks for them; the last layer is activated only with ``activate_output``. Dropout belongs to training.
A chain without activation and normalisation is affine, N(x) = M x + c, and then a change of weights, exactly:

    W' = W (I + m M)        b' = m W c

Sources: A1111 ``modules/hypernetworks/hypernetwork.py`` (``HypernetworkModule``, ``Hypernetwork.load``); spec/artefacts.md F.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hubtool.adapters.ir import ModuleKey
from hubtool.adapters.weight_ops import SwapHalves, TakeRows, WeightOp
from hubtool.errors import CorruptFile, Unsupported
from hubtool.tensors.expr import Expr, Read
from hubtool.tensors.ref import TensorRef
from hubtool.types import Shape

# 768.0.linear.0.weight (pickle), 768.0.linear1.weight (NovelAI), hn.768.k.linear.0.weight (hubtool's safetensors form)
KEY = re.compile(r"(?:hn\.)?(\d{1,6})\.([01kv])\.(linear(?:\.?(\d{1,3}))\.(weight|bias))")
_SIDES = {"0": "k", "1": "v", "k": "k", "v": "v"}
SETTINGS = "hubtool.hypernetwork"  # metadata entry of the safetensors form: the other fields, as JSON
_LINEAR = (None, "linear")


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer (weight (out, in)) or a layer normalisation (weight (width,)) at ``index`` of the chain."""

    index: int
    weight: Expr
    bias: Expr | None

    @property
    def normalises(self) -> bool:
        return len(self.weight.shape) == 1


@dataclass(frozen=True, slots=True)
class Network:
    """One chain. ``width`` is that of its input and output; ``settings`` are the file's fields (activation_func ...)."""

    width: int
    side: str  # k or v
    layers: tuple[Layer, ...]
    settings: Mapping[str, Any]

    @property
    def activation(self) -> str | None:
        return self.settings.get("activation_func")

    def activated(self, layer: Layer) -> bool:
        """Whether the activation follows this linear layer. A file that does not say activates its output, as A1111 reads it."""
        linear = [other for other in self.layers if not other.normalises]
        last = layer is linear[-1]
        return self.activation not in _LINEAR and (not last or self.settings.get("activate_output", True) is not False)

    def nonlinear(self) -> str | None:
        """Why the chain is no affine map; None when it is one."""
        if any(layer.normalises for layer in self.layers):
            return "it normalises its layers"
        if any(self.activated(layer) for layer in self.layers):
            return f"its activation is {self.activation}"
        return None

    def check(self) -> None:
        """Raise ``CorruptFile`` when the layers do not form a chain from ``width`` to ``width``."""
        at = self.width
        for layer in self.layers:
            shape = layer.weight.shape
            if shape[-1] != at or len(shape) > 2 or (layer.bias is not None and layer.bias.shape != shape[:1]):
                raise CorruptFile(
                    f"layer {layer.index} of {self.width}.{self.side} has shape {shape} after {at} numbers"
                )
            at = shape[0]
        if at != self.width or all(layer.normalises for layer in self.layers):
            raise CorruptFile(f"the network {self.width}.{self.side} ends {at} wide")


@dataclass(frozen=True, slots=True)
class Hypernetwork:
    """All networks of a file: (width, side) -> chain."""

    networks: Mapping[tuple[int, str], Network]

    def nonlinear(self) -> str | None:
        """The first reason why this cannot be collapsed; None when it can."""
        return next((why for network in self.networks.values() if (why := network.nonlinear())), None)

    def patches(self, shapes: Mapping[ModuleKey, Shape]) -> dict[ModuleKey, ContextAffine]:
        """The exact change of every key and value projection among ``shapes`` ((component, path) -> weight shape).

        Raises ``Unsupported`` with the reason for a hypernetwork that is not affine.
        """
        found: dict[ModuleKey, ContextAffine] = {}
        for (component, path), shape in shapes.items():
            side = {"to_k": "k", "to_v": "v"}.get(path.rpartition(".")[2])
            network = self.networks.get((shape[-1], side or ""))
            if network is not None and len(shape) == 2:
                found[component, path] = ContextAffine(network)
        return found


@dataclass(frozen=True, slots=True)
class ContextAffine:
    """What an affine network does to one projection. It acts on the input, so taking or moving rows of W leaves it as it is."""

    network: Network
    algorithm = "hypernetwork"
    rank = None
    alpha_value = None
    scale = 1.0
    dora_scale = None
    needs_base = True
    weight_shape = None

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        return None, self.network.width

    def roles(self) -> Iterator[tuple[str, Expr]]:
        for layer in self.network.layers:
            yield f"linear.{layer.index}.weight", layer.weight
            if layer.bias is not None:
                yield f"linear.{layer.index}.bias", layer.bias

    def check(self, name: str) -> None:
        """Raise ``CorruptFile`` when the layers do not fit one another."""
        self.network.check()

    def under(self, op: WeightOp) -> ContextAffine:
        if isinstance(op, TakeRows | SwapHalves):
            return self
        raise Unsupported(f"a hypernetwork acts on a projection's input; {type(op).__name__} changes the input")

    def delta(self, base: Any = None) -> Any:
        """W M in fp32 at strength 1, from the base weight W."""
        if base is None:
            raise Unsupported("the change of a hypernetwork depends on the base weight")
        return (base.double() @ affine(self.network)[0]).float()

    def bias(self, base: Any) -> Any:
        """W c in fp32 at strength 1, from the base weight W: added to the bias (Stable Diffusion's projections have none)."""
        return (base.double() @ affine(self.network)[1]).float()

    def bias_delta(self, base_bias: Any = None) -> Any | None:
        raise Unsupported("a hypernetwork's change of the bias comes from the base weight: see bias(base)")


def parse(tensors: Mapping[str, TensorRef], settings: Mapping[str, Any]) -> Hypernetwork:
    """Group tensors named as in a pickle or in hubtool's safetensors form. Raises ``CorruptFile``."""
    parts: dict[tuple[int, str], dict[int, dict[str, Expr]]] = {}
    for name, ref in tensors.items():
        match = KEY.fullmatch(name)
        if match is None:
            raise CorruptFile(f"{name[:80]!a} is no part of a hypernetwork", path=ref.path)
        width, side, _, index, role = match.groups()
        parts.setdefault((int(width), _SIDES[side]), {}).setdefault(int(index), {})[role] = Read(ref)
    networks = {at: _network(at, layers, settings) for at, layers in parts.items()}
    return Hypernetwork(MappingProxyType(networks))


def _network(at: tuple[int, str], layers: Mapping[int, Mapping[str, Expr]], settings: Mapping[str, Any]) -> Network:
    lone = [index for index, parts in layers.items() if "weight" not in parts]
    if lone:
        raise CorruptFile(f"layer {lone[0]} of {at[0]}.{at[1]} has no weight")
    chain = tuple(Layer(index, layers[index]["weight"], layers[index].get("bias")) for index in sorted(layers))
    network = Network(*at, chain, settings)
    network.check()
    return network


def side_of(text: str) -> str:
    """``k`` or ``v``, from either spelling."""
    return _SIDES[text]


def affine(network: Network) -> tuple[Any, Any]:
    """(M, c) with N(x) = M x + c: torch tensors (width, width) and (width,) in fp64. Raises ``Unsupported`` with the reason."""
    import torch

    why = network.nonlinear()
    if why is not None:
        raise Unsupported(f"the network {network.width}.{network.side} is no linear map: {why}")
    matrix = torch.eye(network.width, dtype=torch.float64)
    offset = torch.zeros(network.width, dtype=torch.float64)
    for layer in network.layers:
        weight, bias = _values(layer)
        matrix, offset = weight @ matrix, weight @ offset + bias
    return matrix, offset


def forward(network: Network, x: Any, strength: float = 1.0) -> Any:
    """x + strength * N(x) for x (..., width), in x's dtype: what the reference feeds to ``to_k`` or ``to_v``. Raises ``Unsupported``."""
    held = [tuple(value.to(x.dtype) for value in _values(layer)) for layer in network.layers]
    return x + strength * run(network, held, after(network), x)


def after(network: Network) -> Any:
    """The activation as a function; None without one. Raises ``Unsupported`` for a name that torch does not know."""
    return None if network.activation in _LINEAR else _activation(str(network.activation))


def run(network: Network, held: Sequence[Any], active: Any, x: Any) -> Any:
    """N(x). ``held``: (weight, bias) of every layer where x is and in its dtype; ``active``: the activation."""
    from torch.nn.functional import layer_norm, linear

    for layer, (weight, bias) in zip(network.layers, held, strict=True):
        if layer.normalises:
            x = layer_norm(x, weight.shape, weight, bias)
            continue
        x = linear(x, weight, bias)
        if active is not None and network.activated(layer):
            x = active(x)
    return x


def _values(layer: Layer) -> tuple[Any, Any]:
    import torch

    from hubtool.tensors.evaluate import compute

    weight = compute(layer.weight).double()
    bias = torch.zeros(weight.shape[0], dtype=torch.float64) if layer.bias is None else compute(layer.bias).double()
    return weight, bias


def _activation(name: str) -> Any:
    """A1111 names torch's activation classes in lower case; its ``swish`` is the hard one."""
    from torch.nn.modules import activation

    wanted = {"swish": "hardswish"}.get(name, name)
    classes = {known.lower(): getattr(activation, known) for known in activation.__all__}
    if wanted not in classes:
        raise Unsupported(f"no activation is called {name[:40]!a}")
    try:
        return classes[wanted]().eval()
    except TypeError as error:
        raise Unsupported(f"the activation {name} needs settings that a hypernetwork file does not have") from error
