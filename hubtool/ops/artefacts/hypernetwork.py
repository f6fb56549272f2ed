"""Hypernetworks: A1111's ``.pt`` <-> safetensors with every field, and the exact collapse of an affine one to single layers.

safetensors form: ``hn.{width}.{k|v}.linear.{i}.{weight|bias}`` and the other fields of the ``.pt``, in their order, as JSON in
``hubtool.hypernetwork`` (spec/artefacts.md F.1). Layout ``linear``: every network as one linear layer, where that is exact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hubtool.adapters.hypernetwork import KEY, SETTINGS, ContextAffine, Hypernetwork, Network, affine, parse, side_of
from hubtool.adapters.identity import Identity
from hubtool.adapters.ir import Adapter, ModuleKey, Patch
from hubtool.adapters.registry import make
from hubtool.errors import Unsupported, UsageProblem
from hubtool.formats.base import TensorFile
from hubtool.layouts.emission import Loss
from hubtool.layouts.unwrap import unwrapped
from hubtool.ops.artefacts._common import as_json, carried, fields, metadata_losses, to_torch, value
from hubtool.ops.plan import Plan
from hubtool.tensors.expr import Compute, Expr, Read

if TYPE_CHECKING:
    from hubtool.ops.target import Target

LAYOUTS = ("a1111", "flat", "linear")


def convert(file: TensorFile, identity: Identity, target: Target) -> Plan:
    """The other container, or the collapse. Raises ``UsageProblem`` for an unknown layout, ``Unsupported`` for a collapse that is not exact."""
    torch = to_torch(target) or (target.format is None and target.layout == "a1111")
    if target.layout not in (None, *LAYOUTS):
        hint = f"one of {', '.join(LAYOUTS)}; as a change of weights it needs its base"
        raise UsageProblem(f"a hypernetwork has no layout {target.layout}", hint=hint)
    if (target.layout == "a1111" and not torch) or (target.layout == "flat" and torch):
        raise UsageProblem(
            f"layout {target.layout} belongs in another container", hint="a1111 is .pt, flat is .safetensors"
        )
    tensors, settings = {name: Read(ref) for name, ref in unwrapped(file)[0].items()}, settings_of(file)
    if target.layout == "linear":
        return _write(file, *_collapsed(read(file), settings), torch, _collapse_facts(tensors, settings))
    return _write(file, tensors, settings, torch, {"layout": "a1111" if torch else "flat"})


def read(file: TensorFile) -> Hypernetwork:
    """The networks of a file. Raises ``CorruptFile``."""
    return parse(unwrapped(file)[0], settings_of(file))


def contents(file: TensorFile) -> dict[str, Expr]:
    """Every layer by its name in the safetensors form."""
    return {_flat_name(name): Read(ref) for name, ref in unwrapped(file)[0].items()}


def settings_of(file: TensorFile) -> dict[str, Any]:
    """The fields beside the networks, in the file's order: ``layer_structure``, ``activation_func``, ``name``, ``step`` ..."""
    if file.structure is not None:
        return fields(file)
    kept = value(file.metadata.get(SETTINGS, "null"))
    return kept if isinstance(kept, dict) else fields(file)


def folded(
    hypernetwork: Hypernetwork, base: Mapping[ModuleKey, Expr], family: str | None, strength: float = 1.0
) -> Adapter:
    """The change of every projection in ``base`` ((component, path) -> weight) as ``diff`` and ``diff_b``: W' = W (I + m M), b' = m W c.

    Computed in fp64, rounded once to fp32. Raises ``Unsupported`` with the reason for a hypernetwork that is not affine.
    """
    found = hypernetwork.patches({key: weight.shape for key, weight in base.items()})
    patches = {key: _difference(patch, base[key], strength) for key, patch in found.items()}
    return Adapter(family, patches)


def _difference(patch: ContextAffine, weight: Expr, strength: float) -> Patch:
    params = (("patch", patch), ("strength", strength))
    diff = Compute(_weight_change, (weight,), weight.shape, "F32", params)
    return make("full", {"diff": diff, "diff_b": Compute(_bias_change, (weight,), weight.shape[:1], "F32", params)})


def _weight_change(weight: Any, *, patch: ContextAffine, strength: float) -> Any:
    return strength * patch.delta(weight)


def _bias_change(weight: Any, *, patch: ContextAffine, strength: float) -> Any:
    return strength * patch.bias(weight)


def _write(
    file: TensorFile, tensors: Mapping[str, Expr], settings: Mapping[str, Any], torch: bool, facts: Mapping[str, Any]
) -> Plan:
    if torch:
        losses = tuple(metadata_losses(file, (SETTINGS,)))
        return Plan(file.path, "torch-zip", tensors=tensors, tree=_tree(tensors, settings), losses=losses, **facts)
    if file.format == "safetensors" and "rounded" not in facts:
        return Plan(
            file.path, "safetensors", tensors=tensors, metadata=dict(file.metadata), header=file.header_bytes, **facts
        )
    kept = {name: item for name, item in settings.items() if as_json(item) is not None}
    losses = tuple(Loss(f"field {name}", "JSON has no word for it") for name in settings if name not in kept)
    metadata = {"format": "pt", **carried(file), SETTINGS: json.dumps(kept, ensure_ascii=False)}
    named = {_flat_name(name): tensor for name, tensor in tensors.items()}
    return Plan(file.path, "safetensors", tensors=named, metadata=metadata, losses=losses, **facts)


def _flat_name(name: str) -> str:
    width, side, rest = _parts(name)
    return f"hn.{width}.{side}.{rest}"


def _parts(name: str) -> tuple[int, str, str]:
    match = KEY.fullmatch(name)
    assert match is not None, name  # the recogniser let nothing else pass
    return int(match[1]), side_of(match[2]), match[3]


def _tree(tensors: Mapping[str, Expr], settings: Mapping[str, Any]) -> dict[Any, Any]:
    """{width: (key network, value network), ..., field: value ...} with integer keys, in A1111's order."""
    pairs: dict[int, dict[str, dict[str, Expr]]] = {}
    for name, tensor in tensors.items():
        width, side, rest = _parts(name)
        pairs.setdefault(width, {"k": {}, "v": {}})[side][rest] = tensor
    return {**{width: (pair["k"], pair["v"]) for width, pair in pairs.items()}, **settings}


def _collapsed(net: Hypernetwork, settings: Mapping[str, Any]) -> tuple[dict[str, Expr], dict[str, Any]]:
    why = net.nonlinear()
    if why is not None:
        hint = "its own forms (a1111, flat) keep it; a LoRA could only be distilled from it"
        raise Unsupported(f"this hypernetwork is no linear map: {why}", hint=hint)
    tensors: dict[str, Expr] = {}
    for network in net.networks.values():
        sources = tuple(part for layer in network.layers for part in (layer.weight, layer.bias) if part is not None)
        for role, shape in (("weight", (network.width, network.width)), ("bias", (network.width,))):
            params = (("network", network), ("role", role))
            name = f"hn.{network.width}.{network.side}.linear.0.{role}"
            tensors[name] = Compute(_single, sources, shape, "F32", params)
    return tensors, {**settings, **_SINGLE}


# One layer has no activation and nothing to drop.
_SINGLE = {
    "layer_structure": [1, 1], "activation_func": "linear", "is_layer_norm": False, "activate_output": False,
    "use_dropout": False, "dropout_structure": None, "last_layer_dropout": False,
}  # fmt: skip


def _single(*_: Any, network: Network, role: str) -> Any:
    return affine(network)[0 if role == "weight" else 1].float()


def _collapse_facts(tensors: Mapping[str, Expr], settings: Mapping[str, Any]) -> dict[str, Any]:
    layers = len(tensors)
    facts: dict[str, Any] = {
        "layout": "linear",
        "rounded": {f"{layers} tensors": "multiplied into one layer per network in fp64, rounded once to F32"},
    }
    if settings.get("use_dropout") or settings.get("dropout_structure"):
        facts["notes"] = ("the dropout is gone with the layers; it belongs to training only",)
    return facts
