"""Out of the pipeline again: the factors in PEFT's layers as an adapter, and as a file in any layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hubtool.adapters.ir import Adapter, Embedding, ModuleKey, Patch
from hubtool.adapters.low_rank import LowRank
from hubtool.errors import LossyConversion, Unsupported, UsageProblem
from hubtool.layouts import emit, tables
from hubtool.pipelines import live
from hubtool.pipelines.collapse import collapsed, patches_of
from hubtool.pipelines.families import family_of
from hubtool.pipelines.lora import layer_parameters
from hubtool.pipelines.report import Record, records
from hubtool.tensors.dtypes import FROM_TORCH, TORCH_NAME
from hubtool.tensors.expr import Expr, Literal, reshape
from hubtool.tensors.writer import write_safetensors

_SHOWN = 3


def save(
    pipe: Any,
    name: str,
    path: str | Path,
    *,
    layout: str = "diffusers",
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> Path:
    """Write adapter ``name`` as it is now to a safetensors file, bit for bit: no cast, no strength folded in; return the path.

    ``metadata`` joins what the layout needs. Raises ``UsageProblem`` for an unknown name, ``LossyConversion`` when the layout cannot
    hold all of it, ``WouldOverwrite`` for an existing file without ``force``.
    """
    emission = emit(adapter_of(pipe, name), layout)
    if emission.container != "safetensors":
        hint = f"save it with layout='diffusers', then hubtool convert FILE --layout {layout}"
        raise Unsupported(f"a pipeline saves safetensors files; {layout} is kept in a {emission.container}", hint=hint)
    if emission.losses:
        lost = "; ".join(f"{loss.what}: {loss.reason}" for loss in emission.losses[:_SHOWN])
        raise LossyConversion(f"{layout} cannot hold all of {name}: {lost}", hint="save it with layout='diffusers'")
    write_safetensors(Path(path), emission.tensors, {**(metadata or {}), **emission.metadata}, force=force)
    return Path(path)


def adapter_of(pipe: Any, name: str) -> Adapter:
    """What the pipeline holds under ``name``, as an ``Adapter`` with canonical paths, each module with its own rank and alpha.

    Factors that were widened for the pipeline and did not change since go back to their own dtype, which loses nothing.
    Raises ``UsageProblem`` when there is no such adapter, ``Unsupported`` for what acts from outside the weights.
    """
    record = records(pipe).get(name, Record())
    if record.effect is not None:
        kind = record.report.kind if record.report else "effect"
        raise Unsupported(
            f"{name} is a {kind}, no change of weights: its own file keeps it", hint="hubtool convert FILE"
        )
    patches: dict[ModuleKey, Patch] = {**_layers(pipe, name, record), **patches_of(pipe, name)}
    family = _family(pipe)
    names = {component: _called(record.back.get(component, component), family) for component, _ in patches}
    patches = {(names[component], path): patch for (component, path), patch in patches.items()}
    embeddings = _embeddings(pipe, record.report.tokens if record.report else {})
    if not patches and not embeddings:
        present = ", ".join(sorted(live.adapter_names(pipe) | collapsed(pipe))) or "nothing"
        raise UsageProblem(f"nothing named {name!r} is loaded", hint=f"loaded: {present}")
    return Adapter(family, MappingProxyType(patches), embeddings)


def _family(pipe: Any) -> str | None:
    """The pipeline's family where a table knows its names; the names of the live modules are used as they are otherwise."""
    family = family_of(pipe)
    return family if family in tables.family_ids() else None


def _called(component: str, family: str | None) -> str:
    """What the family's table calls a component of the pipeline."""
    known = tables.family(family).components if family else ()
    return component if component in known else next((one for one in live.told(component) if one in known), component)


def _layers(pipe: Any, name: str, record: Record) -> dict[ModuleKey, Patch]:
    models = live.components(pipe).items()
    return {key: patch for c, model in models for key, patch in layers_of(model, c, name, record.dtypes).items()}


def layers_of(
    model: Any, component: str, name: str, dtypes: Mapping[tuple[str, str], str] = MappingProxyType({})
) -> dict[ModuleKey, Patch]:
    """The factors of adapter ``name`` in one component, by canonical path. ``dtypes``: of the source, by (component, live path)."""
    return {
        (component, live.canonical_path(component, path)): _patch(layer, name, dtypes.get((component, path)))
        for path, layer in live.adapter_layers(model, name).items()
    }


def _patch(layer: Any, name: str, dtype: str | None) -> LowRank:
    tensors = {key: _literal(parameter, dtype) for key, parameter in layer_parameters(layer, name).items()}
    return LowRank(
        up=tensors["lora_B.weight"],
        down=tensors["lora_A.weight"],
        alpha_value=float(layer.lora_alpha[name]),
        dora_scale=_per_output(tensors.get("lora_magnitude_vector.weight")),
        rank_stabilised=bool(layer.use_rslora.get(name, False)),
    )


def _per_output(magnitude: Expr | None) -> Expr | None:
    """PEFT's convolution magnitude (1, out, 1, 1) as (out, 1, 1, 1), which says by itself that it is one per output."""
    if magnitude is None or len(magnitude.shape) == 1:
        return magnitude
    return reshape(magnitude, (magnitude.shape[1], magnitude.shape[0], *magnitude.shape[2:]))


def _embeddings(pipe: Any, tokens: Mapping[str, tuple[str, ...]]) -> tuple[Embedding, ...]:
    """One embedding for each token and encoder; ``token_1`` and its successors are further vectors of ``token``."""
    found: list[Embedding] = []
    for component, names in tokens.items():
        encoder, tokenizer = live.encoders(pipe)[component]
        table = encoder.get_input_embeddings().weight.detach()
        rows = {group[0]: table[tokenizer.convert_tokens_to_ids(group)] for group in _grouped(names)}
        found += [Embedding(token, component, _literal(vectors, None)) for token, vectors in rows.items()]
    return tuple(found)


def _grouped(names: tuple[str, ...]) -> list[list[str]]:
    groups: list[list[str]] = []
    for name in names:
        if groups and name == f"{groups[-1][0]}_{len(groups[-1])}":
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def _literal(tensor: Any, dtype: str | None) -> Expr:
    """The tensor's bytes; in ``dtype`` when every value fits it exactly."""
    import torch

    value = tensor.detach().cpu()
    if dtype is not None and dtype in TORCH_NAME:
        narrow = value.to(getattr(torch, TORCH_NAME[dtype]))
        value = narrow if torch.equal(narrow.to(value.dtype), value) else value
    flat = value.contiguous().reshape(-1).view(torch.uint8)
    data = bytearray(flat.numel())
    torch.frombuffer(data, dtype=torch.uint8).copy_(flat)
    return Literal(bytes(data), FROM_TORCH[str(value.dtype).removeprefix("torch.")], tuple(value.shape))
