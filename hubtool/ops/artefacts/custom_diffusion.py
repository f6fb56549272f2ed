"""Custom Diffusion: CompVis <-> CMU-diffusers <-> diffusers, full or compressed, and folded into an adapter layout exactly.

A replacement becomes ``set_weight``, a compressed pair a low rank: both need no base. What a form cannot hold is a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hubtool.adapters.custom_diffusion import (
    FORMS,
    CustomDiffusion,
    empty_processors,
    parse,
    stacked,
    to_ldm,
    to_processor,
)
from hubtool.adapters.identity import Identity
from hubtool.adapters.ir import Adapter, Embedding
from hubtool.adapters.token_embeddings import emit_embedding
from hubtool.errors import ConversionError, Unsupported, UsageProblem
from hubtool.formats.base import TensorFile
from hubtool.layouts.emission import Loss
from hubtool.layouts.emit import emit
from hubtool.layouts.unwrap import unwrapped
from hubtool.ops.artefacts._common import as_metadata, carried, fields, leaves, metadata_losses, to_torch, unchanged
from hubtool.ops.plan import Plan
from hubtool.tensors.expr import Expr, Read, reshape

if TYPE_CHECKING:
    from hubtool.ops.target import Target

_LDM = "model.diffusion_model."
_OWN_FILES = "diffusers keeps every token in a file of its own: write them with --component tokens"
_ADDED = "its factors are added to the base weight, and diffusers' form holds whole weights"


@dataclass(slots=True)
class _Draft:
    """``tree``: the torch object; ``flat``: the same tensors by safetensors key; ``empty``: keys of a torch file that hold nothing."""

    tree: dict[str, Any] = field(default_factory=dict)
    flat: dict[str, Expr] = field(default_factory=dict)
    losses: list[Loss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert(file: TensorFile, identity: Identity, target: Target) -> Plan:
    """Another form, an adapter layout, or the tokens alone (``--component tokens``). Raises ``UsageProblem``, ``Unsupported``."""
    found = parse(unwrapped(file)[0])
    if found is None:
        raise ConversionError("these tensors are no Custom Diffusion", path=file.path)
    if target.component is not None:
        return _component(file, found, target)
    own = _own_form(file, found)
    form = target.layout or own
    if target.layout == "compressed":
        form = _compressed(found, own)
    if form not in FORMS and form != "cmu-sdxl":
        return _adapter(file, found, target)
    torch = to_torch(target)
    if form == own and file.format == "safetensors" and not torch:
        return unchanged(file, {name: Read(ref) for name, ref in file.tensors.items()}, form)
    return _written(file, found, "cmu" if form == "cmu-sdxl" else form, torch)


def contents(file: TensorFile) -> dict[str, Expr]:
    """Weights and factors under diffusers' names, tokens by position, text encoders."""
    found = parse(unwrapped(file)[0])
    if found is None:
        raise ConversionError("these tensors are no Custom Diffusion", path=file.path)
    factors = {f"{name}.{role}": t for name, pair in found.factors.items() for role, t in zip("uv", pair, strict=True)}
    tokens = {f"token {i}": token.vectors for i, token in enumerate(found.tokens)}
    return {**found.weights, **factors, **tokens, **found.text_encoders}


def _own_form(file: TensorFile, found: CustomDiffusion) -> str:
    if found.variant != "compressed":
        return found.variant
    return "compvis" if any(_LDM in key for key in file.tensors) else "cmu"


def _compressed(found: CustomDiffusion, own: str) -> str:
    if not found.factors:
        reason = "these are whole weights; factors are of their difference to the base"
        raise Unsupported(reason, hint="the base is needed: hubtool extract")
    return own


def _written(file: TensorFile, found: CustomDiffusion, form: str, torch: bool) -> Plan:
    draft = _Draft()
    _WRITERS[form](found, draft, torch)
    extra, lost = ({}, ()) if torch else as_metadata(_facts(file))
    draft.losses += metadata_losses(file) if torch else lost
    if torch:
        draft.tree |= _facts(file)
    return Plan(
        source=file.path,
        format="torch-zip" if torch else "safetensors",
        layout=form,
        tensors=draft.flat,
        metadata={} if torch else {"format": "pt", **carried(file), **extra},
        tree=draft.tree if torch else None,
        losses=tuple(draft.losses),
        notes=tuple(draft.notes),
    )


def _facts(file: TensorFile) -> dict[str, Any]:
    """Values beside the tensors. diffusers' empty processors are written anew for the form that has them."""
    return {name: item for name, item in fields(file).items() if item != {}}


def _compvis(found: CustomDiffusion, draft: _Draft, torch: bool) -> None:
    inner: dict[str, Any] = {}
    for name, value in (*found.weights.items(), *found.factors.items()):
        spelled = to_ldm(name)
        if spelled is None:
            draft.losses.append(Loss(name, "the LDM U-Net has no such block"))
        else:
            _put(inner, draft.flat, _LDM + spelled, value)
    _embed(found, inner, draft)
    draft.losses += _whole_encoders(found, "CompVis keeps only the U-Net's weights and the tokens")
    draft.tree = {"state_dict": inner}


def _embed(found: CustomDiffusion, inner: dict[str, Any], draft: _Draft) -> None:
    widths = {token.vectors.shape for token in found.tokens}
    if len(widths) > 1:
        draft.losses += [Loss(f"token {t.token}", "CompVis has one text encoder") for t in found.tokens]
        return
    if found.tokens:
        inner["embed"] = draft.flat["embed"] = stacked(found.tokens)
    draft.losses += [
        Loss(f"the name {token.token}", f"CompVis stores no names: this token becomes <new{i}>")
        for i, token in enumerate(found.tokens, 1)
        if token.token != f"<new{i}>"
    ]


def _cmu(found: CustomDiffusion, draft: _Draft, torch: bool) -> None:
    unet: dict[str, Any] = {}
    for name, value in (*found.weights.items(), *found.factors.items()):
        spread: dict[str, Expr] = {}
        _put(unet, spread, name, value)
        draft.flat |= {f"unet.{key}": tensor for key, tensor in spread.items()}
    draft.tree = {"unet": unet}
    if found.tokens:
        draft.tree["modifier_token"] = _modifiers(found.tokens, draft)
    for key, tensor in found.text_encoders.items():
        component, _, name = key.partition(".")
        draft.tree.setdefault(component, {})[name] = draft.flat[key] = tensor


def _modifiers(tokens: tuple[Embedding, ...], draft: _Draft) -> dict[str, Any]:
    """{token: (width,)}, and for two text encoders {token: [(768,), (1280,)]}."""
    grouped: dict[str, list[Expr]] = {}
    for token in tokens:
        grouped.setdefault(token.token or "", []).append(_vector(token.vectors))
    for name, vectors in grouped.items():
        keys = [f"modifier_token.{name}"] if len(vectors) == 1 else [f"modifier_token.{name}.{i}" for i in (0, 1)]
        draft.flat |= dict(zip(keys, vectors, strict=False))
    return {name: vectors[0] if len(vectors) == 1 else vectors for name, vectors in grouped.items()}


def _vector(vectors: Expr) -> Expr:
    return reshape(vectors, vectors.shape[1:]) if vectors.shape[0] == 1 else vectors


def _diffusers(found: CustomDiffusion, draft: _Draft, torch: bool) -> None:
    for name, weight in found.weights.items():
        key = to_processor(name)
        if key is None:
            draft.losses.append(Loss(name, "diffusers' processors hold attn2's projections only"))
        else:
            draft.tree[key] = draft.flat[key] = weight
    draft.losses += [Loss(name, _ADDED) for name in found.factors]
    draft.losses += [Loss(f"token {name}", _OWN_FILES) for name in dict.fromkeys(t.token for t in found.tokens)]
    draft.losses += _whole_encoders(found, "diffusers' form holds processors only")
    draft.tree |= {key: {} for key in empty_processors(found.weights)}
    if not torch:
        draft.notes.append("diffusers' load_attn_procs cannot read its own safetensors form; .bin it can")


_WRITERS: Mapping[str, Callable[[CustomDiffusion, _Draft, bool], None]] = {
    "compvis": _compvis, "cmu": _cmu, "diffusers": _diffusers,
}  # fmt: skip


def _put(tree: dict[str, Any], flat: dict[str, Expr], name: str, value: Expr | tuple[Expr, Expr]) -> None:
    if isinstance(value, tuple):
        tree[name] = dict(zip("uv", value, strict=True))
        flat |= {f"{name}.{role}": tensor for role, tensor in tree[name].items()}
    else:
        tree[name] = flat[name] = value


def _whole_encoders(found: CustomDiffusion, reason: str) -> Iterator[Loss]:
    for component in dict.fromkeys(key.partition(".")[0] for key in found.text_encoders):
        yield Loss(f"the whole {component}", reason)


def _adapter(file: TensorFile, found: CustomDiffusion, target: Target) -> Plan:
    """Folded: replacements as ``set_weight``, factors as up and down, tokens as bundled embeddings where the layout has them."""
    patches, biases = found.patches()
    adapter = Adapter(found.family or target.family, patches, found.tokens, metadata=carried(file))
    emission = emit(adapter, target.layout or "", family=target.family)
    if emission.container != "safetensors":
        raise UsageProblem(f"Custom Diffusion cannot be written as {target.layout}", hint="try kohya")
    torch = to_torch(target)
    losses = [*emission.losses, *_whole_encoders(found, "an adapter changes modules; this replaces an encoder")]
    losses += [Loss(name, "no adapter layout has a role for a replaced bias") for name in biases]
    extra, lost = ({}, ()) if torch else as_metadata(_facts(file))
    return Plan(
        source=file.path,
        format="torch-zip" if torch else "safetensors",
        layout=str(emission.layout),
        tensors=emission.tensors,
        metadata={} if torch else {"format": "pt", **carried(file), **extra, **emission.metadata},
        losses=(*losses, *lost, *(metadata_losses(file) if torch else ())),
        notes=tuple(emission.notes),
        rounded=emission.rounded,
    )


def _component(file: TensorFile, found: CustomDiffusion, target: Target) -> Plan:
    """The tokens as a textual inversion, or one whole text encoder as a state dict."""
    if target.component == "tokens" and found.tokens:
        return _tokens(file, found, target)
    held = {k.partition(".")[2]: t for k, t in found.text_encoders.items() if k.partition(".")[0] == target.component}
    if not held:
        parts = ["tokens"] * bool(found.tokens) + list(dict.fromkeys(k.partition(".")[0] for k in found.text_encoders))
        raise UsageProblem(f"there is no component {target.component}", hint=f"it has {', '.join(parts) or 'none'}")
    torch = to_torch(target)
    return Plan(
        file.path,
        "torch-zip" if torch else "safetensors",
        None,
        held,
        {} if torch else {"format": "pt"},
        tree=held if torch else None,
    )


def _tokens(file: TensorFile, found: CustomDiffusion, target: Target) -> Plan:
    torch = to_torch(target)
    several = len({token.token for token in found.tokens}) > 1
    encoding = target.layout or ("diffusers-bin" if torch else "diffusers")
    if len(found.tokens) > 1 and not several and target.layout is None:
        encoding = "kohya-sdxl"  # one token of two encoders
    tree = emit_embedding(found.tokens, encoding)
    if not torch and (encoding in ("a1111", "raw") or not isinstance(tree, dict)):
        raise UsageProblem(f"encoding {encoding} is a torch file", hint="name the output .pt")
    token = {} if several else {"hubtool.token": found.tokens[0].token or ""}
    return Plan(
        file.path,
        "torch-zip" if torch else "safetensors",
        encoding,
        leaves(tree),
        {} if torch else {"format": "pt", **token},
        tree=tree if torch else None,
    )
