"""Low-rank adapters in a live pipeline: hand over, count what changed, take back."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

from hubtool.errors import LoadMismatch, UsageProblem
from hubtool.pipelines import live
from hubtool.pipelines.activity import Activity, activate, observe, restore, restore_scaling, restore_training
from hubtool.pipelines.plan import LayerPlan, config, grouped
from hubtool.pipelines.targets import shown

Plans = dict[str, list[LayerPlan]]
# the only spelling that diffusers takes for any module of a text encoder: with PEFT's own it asks for attention projections
_ENCODER_WORDS = {"lora_A.weight": "lora_linear_layer.down.weight", "lora_B.weight": "lora_linear_layer.up.weight"}
_PATTERNS = ("rank_pattern", "alpha_pattern")


def check_name(name: str) -> None:
    """Raise ``UsageProblem`` unless PEFT can use ``name`` as a module's name."""
    from torch import nn

    if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
        raise UsageProblem(
            f"{name!r} cannot name an adapter in PEFT", hint="use letters, digits and underscores: name="
        )


def check_unfused(pipe: Any) -> None:
    """Raise ``UsageProblem`` while adapters are fused: their change lies in the weights, and PEFT would silently take it out."""
    fused = live.merged(pipe)
    if fused:
        raise UsageProblem(f"{', '.join(sorted(fused))} is fused into the weights", hint="pipe.unfuse_lora() first")


def load_layers(pipe: Any, plans: Plans, name: str, strength: float, *, trainable: bool) -> list[Any]:
    """Load the planned factors as adapter ``name`` beside those active already; return its parameters.

    Raises ``LoadMismatch`` when the modules changed are not the modules planned, after taking everything back.
    """
    before = observe(pipe)
    with ExitStack() as undo:
        undo.callback(_take_back, pipe, name, before)
        for component, layers in plans.items():
            _hand_over(pipe, component, layers, name)
        verify(pipe, plans, name)
        undo.pop_all()
    _settle(pipe, plans, name, strength, before)
    parameters = [parameter for component in plans for parameter in _parameters(live.modules(pipe)[component], name)]
    restore_training((p, flag and not trainable) for p, flag in before.trains)
    for parameter in parameters:
        parameter.requires_grad_(trainable)
    return parameters


def unload_layers(pipe: Any, name: str) -> None:
    """Remove adapter ``name`` and the wrappers that no other adapter needs. Activity of the other adapters stays as it is."""
    _take_back(pipe, name, observe(pipe))


def verify(pipe: Any, plans: Plans, name: str) -> None:
    """Compare what the pipeline holds with what was planned: modules, scale, and every bit of every factor.

    Raises ``LoadMismatch`` that lists what is missing, what is extra, and what differs.
    """
    wanted = {(component, one.path): one for component, layers in plans.items() for one in layers}
    models = live.components(pipe).items()
    changed = {(c, path): layer for c, model in models for path, layer in live.adapter_layers(model, name).items()}
    both = wanted.keys() & changed.keys()
    problems = {
        "missing": wanted.keys() - changed.keys(),
        "extra": changed.keys() - wanted.keys(),
        "with another scale": {key for key in both if not _same_scale(wanted[key], changed[key], name)},
        "with other values": {key for key in both if not _same_values(wanted[key], changed[key], name)},
    }
    found = [f"{len(keys)} {what}: {shown(sorted(map('.'.join, keys)))}" for what, keys in problems.items() if keys]
    if found:
        raise LoadMismatch(f"{len(wanted)} modules were planned, {len(changed)} changed; " + "; ".join(found))


def _hand_over(pipe: Any, component: str, layers: list[LayerPlan], name: str) -> None:
    """One component through diffusers' own loader. It keeps the tensors it is given, which is why plans hold copies."""
    settings, model = config(layers), live.modules(pipe)[component]
    words = {} if hasattr(model, "load_lora_adapter") else _ENCODER_WORDS
    state = {
        f"{component}.{one.path}.{words.get(key, key)}": tensor
        for one in layers
        for key, tensor in one.tensors().items()
    }
    quick = settings | {key: grouped(settings[key]) for key in _PATTERNS}
    metadata = {f"{component}.{key}": value for key, value in quick.items()}
    options = {"adapter_name": name, "metadata": metadata, "low_cpu_mem_usage": True, "_pipeline": pipe}
    with live.aside():
        try:
            if hasattr(model, "load_lora_adapter"):
                model.load_lora_adapter(state, prefix=component, **options)
            else:
                pipe.load_lora_into_text_encoder(state, None, model, prefix=component, **options)
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise LoadMismatch(f"diffusers refused the factors of {component}: {error}") from error
    for key in _PATTERNS:  # what diffusers and PEFT will write into files: plain paths
        setattr(model.peft_config[name], key, settings[key])
    _keep_dtype(model, layers, name)


def _keep_dtype(model: Any, layers: list[LayerPlan], name: str) -> None:
    """diffusers casts a text encoder's factors to the encoder's dtype: put the planned values back where that lost bits."""
    held = live.adapter_layers(model, name)
    for one in layers:
        for key, parameter in layer_parameters(held[one.path], name).items() if one.path in held else ():
            wanted = one.tensors()[key]
            if parameter.dtype != wanted.dtype:
                parameter.data = wanted.to(parameter.device)


def layer_parameters(layer: Any, name: str) -> dict[str, Any]:
    """Adapter ``name``'s parameters in a PEFT layer, under the names of ``LayerPlan.tensors``."""
    found = {"lora_A.weight": layer.lora_A[name].weight, "lora_B.weight": layer.lora_B[name].weight}
    magnitudes = getattr(layer, "lora_magnitude_vector", {})
    return {**found, "lora_magnitude_vector.weight": magnitudes[name].weight} if name in magnitudes else found


def _parameters(model: Any, name: str) -> list[Any]:
    return [p for layer in live.adapter_layers(model, name).values() for p in layer_parameters(layer, name).values()]


def _same_scale(planned: LayerPlan, layer: Any, name: str) -> bool:
    return layer.r[name] == planned.rank and math.isclose(layer.scaling[name], planned.scale, rel_tol=1e-12)


def _same_values(planned: LayerPlan, layer: Any, name: str) -> bool:
    held, wanted = layer_parameters(layer, name), planned.tensors()
    return held.keys() == wanted.keys() and all(_same_bits(held[key].detach().cpu(), wanted[key]) for key in wanted)


def _same_bits(one: Any, other: Any) -> bool:
    import torch

    return one.dtype == other.dtype and torch.equal(one, other)


def _settle(pipe: Any, plans: Plans, name: str, strength: float, before: Activity) -> None:
    activate(pipe, before, added=name)
    restore_scaling(pipe, before)
    for component in plans:
        for layer in live.adapter_layers(live.modules(pipe)[component], name).values():
            layer.set_scale(name, strength)


def _take_back(pipe: Any, name: str, before: Activity) -> None:
    for model in live.components(pipe).values():
        take_out(model, name)
    restore(pipe, before, without=name)


def take_out(model: Any, name: str) -> None:
    """Remove adapter ``name`` from one component, and the wrappers that no other adapter needs."""
    _delete(model, name)
    _unwrap(model)


def _delete(model: Any, name: str) -> None:
    """What the pipeline's ``delete_adapters`` does, for pipelines too that have none."""
    from diffusers.utils.peft_utils import delete_adapter_layers

    if hasattr(model, "delete_adapters"):
        model.delete_adapters(name)
    else:
        delete_adapter_layers(model, name)


def _unwrap(model: Any) -> None:
    """Put the original modules back where no adapter is left: diffusers leaves empty wrappers, and renamed weights, behind."""
    for path, layer in list(live.layers(model)):
        if not any(len(getattr(layer, names, ())) for names in layer.adapter_layer_names):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
