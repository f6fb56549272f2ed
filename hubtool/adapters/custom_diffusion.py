"""Custom Diffusion (Kumari et al. 2022, arXiv 2212.04488): new cross-attention weights and new tokens, in five shapes on disk.

Uncompressed values are replacement weights, not differences; compressed ones are factors u (out, r), v (r, in) whose product is *added*
to the base. Facts: spec/artefacts.md E; writers: CMU's ``custom-diffusion`` (CompVis and diffusers halves, ``compress.py``) and
diffusers' ``train_custom_diffusion.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hubtool.adapters.ir import Embedding, ModuleKey, Patch
from hubtool.adapters.registry import make
from hubtool.errors import CorruptFile
from hubtool.tensors.expr import Expr, Read, concat, reshape, rows
from hubtool.tensors.ref import TensorRef

CROSS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
FORMS = ("compvis", "cmu", "diffusers")
_ENCODER = {768: "text_encoder", 1024: "text_encoder", 1280: "text_encoder_2"}
_LDM = "model.diffusion_model."
_PARTS = ("unet.", "modifier_token.", "text_encoder.", "text_encoder_2.")
_PROCESSOR = re.compile(r"(.+\.attn2)\.processor\.(to_[a-z]+)_custom_diffusion\.(.+)")
_PARAMETER = re.compile(r"(.+\.attn2)\.(to_[a-z]+)\.(.+)")
_BLOCK = re.compile(r"(input_blocks|output_blocks|middle_block)\.(\d+)(?:\.(\d+))?\.(transformer_blocks\..+)")
_ATTENTION = re.compile(r"(?:(down_blocks|up_blocks)\.(\d+)|(mid_block))\.attentions\.(\d+)\.(transformer_blocks\..+)")
Tensors = Mapping[str, TensorRef]


@dataclass(frozen=True, slots=True)
class CustomDiffusion:
    """``weights``: U-Net parameter (diffusers name) -> its replacement; ``factors``: parameter -> (u, v); ``text_encoders``: full states."""

    variant: str
    weights: Mapping[str, Expr]
    factors: Mapping[str, tuple[Expr, Expr]]
    tokens: tuple[Embedding, ...]
    text_encoders: Mapping[str, Expr] = field(default_factory=dict)

    @property
    def family(self) -> str | None:
        """By the width of the context that keys and values read."""
        names = {name: weight.shape[-1] for name, weight in self.weights.items() if weight.shape}
        names |= {name: v.shape[-1] for name, (_, v) in self.factors.items() if v.shape}
        widths = {width for name, width in names.items() if ".to_k." in name or ".to_v." in name}
        return CROSS.get(widths.pop()) if len(widths) == 1 else None

    def patches(self) -> tuple[dict[ModuleKey, Patch], list[str]]:
        """Every change as a patch, exactly and without the base: ``set_weight`` for replacements, a low rank for factors.

        The second value lists parameters that no adapter layout has a role for (biases).
        """
        found: dict[ModuleKey, Patch] = {}
        left = []
        for name, weight in self.weights.items():
            if name.endswith(".weight"):
                found["unet", name.removesuffix(".weight")] = make("set", {"set_weight": weight})
            else:
                left.append(name)
        for name, (u, v) in self.factors.items():
            found["unet", name.removesuffix(".weight")] = make("lora", {"up": u, "down": v})
        return found, left


def parse(tensors: Tensors) -> CustomDiffusion | None:
    """Read any of the shapes; None when the tensors are something else. Raises ``CorruptFile`` for factors that do not fit."""
    first = next(iter(tensors), "")
    if "attn" not in first and not first.startswith(("embed", *_PARTS)):
        return None
    if all("_custom_diffusion." in key for key in tensors):
        return _diffusers(tensors)
    if all(key == "embed" or (key.startswith(_LDM) and ".attn2." in key) for key in tensors):
        return _compvis(tensors)
    unet = [key for key in tensors if key.startswith("unet.")]
    if unet and all(key.startswith(_PARTS) for key in tensors) and all(".attn2." in key for key in unet):
        return _cmu(tensors)
    return None


def _diffusers(tensors: Tensors) -> CustomDiffusion | None:
    matches = {key: _PROCESSOR.fullmatch(key) for key in tensors}
    if not all(matches.values()):
        return None
    weights = {f"{m[1]}.{m[2]}.{m[3]}": Read(tensors[key]) for key, m in matches.items() if m}
    return CustomDiffusion("diffusers", weights, {}, ())


def _compvis(tensors: Tensors) -> CustomDiffusion | None:
    """Names are LDM's. New tokens are the rows of ``embed``: ``<new1>``, ``<new2>`` ... in the reference code."""
    named = {from_ldm(key.removeprefix(_LDM)): ref for key, ref in tensors.items() if key != "embed"}
    if None in named or len(named) + ("embed" in tensors) < len(tensors):
        return None
    weights, factors = _split({str(key): ref for key, ref in named.items()})
    tokens = tuple(_rows_of(tensors["embed"])) if "embed" in tensors else ()
    return CustomDiffusion("compressed" if factors else "compvis", weights, factors, tokens)


def _rows_of(ref: TensorRef) -> Iterator[Embedding]:
    if len(ref.shape) not in (1, 2) or 0 in ref.shape:
        raise CorruptFile(
            f"new tokens of shape {list(ref.shape)}; (n, width) expected", path=ref.path, offset=ref.start
        )
    whole = reshape(Read(ref), (1, *ref.shape)[-2:])
    for i in range(whole.shape[0]):
        yield Embedding(f"<new{i + 1}>", _ENCODER.get(ref.shape[-1]), rows(whole, i, i + 1))


def _cmu(tensors: Tensors) -> CustomDiffusion:
    unet = {key.removeprefix("unet."): ref for key, ref in tensors.items() if key.startswith("unet.")}
    weights, factors = _split(unet)
    tokens = tuple(_named_tokens(tensors))
    encoders = {key: Read(ref) for key, ref in tensors.items() if key.startswith("text_encoder")}
    pairs = len({token.token for token in tokens}) < len(tokens)
    variant = "compressed" if factors else "cmu-sdxl" if pairs else "cmu"
    return CustomDiffusion(variant, weights, factors, tokens, encoders)


def _named_tokens(tensors: Tensors) -> Iterator[Embedding]:
    """``modifier_token.<new1>``; for SDXL a list: ``modifier_token.<new1>.0`` (768 wide) and ``.1`` (1280 wide)."""
    for key, ref in tensors.items():
        name = key.removeprefix("modifier_token.")
        if name == key:
            continue
        if len(ref.shape) not in (1, 2) or 0 in ref.shape:
            raise CorruptFile(f"{key} has shape {list(ref.shape)}; (width,) expected", path=ref.path, offset=ref.start)
        token, _, place = name.rpartition(".")
        token = token if token and place in ("0", "1") else name
        yield Embedding(token, _ENCODER.get(ref.shape[-1]), reshape(Read(ref), (1, *ref.shape)[-2:]))


def _split(named: Tensors) -> tuple[dict[str, Expr], dict[str, tuple[Expr, Expr]]]:
    """Replacements, and the pairs of factors ``X.weight.u`` / ``X.weight.v``."""
    weights: dict[str, Expr] = {}
    factors: dict[str, tuple[Expr, Expr]] = {}
    for key, ref in named.items():
        name, _, role = key.rpartition(".")
        if role not in ("u", "v"):
            weights[key] = Read(ref)
        elif role == "u":
            factors[name] = _pair(name, ref, named.get(f"{name}.v"))
        elif f"{name}.u" not in named:
            raise CorruptFile(f"{name} has a factor v and no u", path=ref.path, offset=ref.start)
    return weights, factors


def _pair(name: str, u: TensorRef, v: TensorRef | None) -> tuple[Expr, Expr]:
    if v is None or len(u.shape) != 2 or len(v.shape) != 2 or u.shape[1] != v.shape[0]:
        shape = None if v is None else list(v.shape)
        raise CorruptFile(f"{name}: factors u {list(u.shape)} and v {shape} cannot be multiplied", path=u.path)
    return Read(u), Read(v)


def from_ldm(name: str) -> str | None:
    """diffusers' name of a transformer block's parameter in an SD1 or SD2 U-Net; None where LDM has no such place."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    side, number, inner, rest = match[1], int(match[2]), match[3], match[4]
    if side == "middle_block":
        return f"mid_block.attentions.0.{rest}" if number == 1 and inner is None else None
    if inner != "1":
        return None
    if side == "input_blocks":
        block, place = divmod(number - 1, 3)
        return f"down_blocks.{block}.attentions.{place}.{rest}" if number > 0 and place < 2 else None
    return f"up_blocks.{number // 3}.attentions.{number % 3}.{rest}"


def to_ldm(name: str) -> str | None:
    """The inverse of ``from_ldm``."""
    match = _ATTENTION.fullmatch(name)
    if match is None:
        return None
    if match[3]:
        return f"middle_block.1.{match[5]}" if match[4] == "0" else None
    block, place = int(match[2]), int(match[4])
    if match[1] == "down_blocks":
        return f"input_blocks.{3 * block + place + 1}.1.{match[5]}"
    return f"output_blocks.{3 * block + place}.1.{match[5]}"


def to_processor(name: str) -> str | None:
    """diffusers' key of a cross-attention parameter in its own Custom Diffusion files."""
    match = _PARAMETER.fullmatch(name)
    return f"{match[1]}.processor.{match[2]}_custom_diffusion.{match[3]}" if match else None


def stacked(tokens: tuple[Embedding, ...]) -> Expr:
    """CompVis's ``embed``: one row per token."""
    return concat(tuple(token.vectors for token in tokens))


def empty_processors(names: Mapping[str, Any]) -> list[str]:
    """Keys of the self-attention processors that a ``.bin`` of diffusers holds with nothing in them, beside ``names``."""
    matches = (_PARAMETER.fullmatch(name) for name in names)
    return list(dict.fromkeys(f"{m[1].removesuffix('2')}1.processor" for m in matches if m))
