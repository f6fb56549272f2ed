"""The trained parts as files: low-rank layers in any layout, token vectors, Custom Diffusion's weights."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hubtool.adapters.custom_diffusion import to_processor
from hubtool.adapters.ir import Adapter, Embedding
from hubtool.adapters.token_embeddings import canonical_metadata
from hubtool.errors import LossyConversion
from hubtool.formats import open_file
from hubtool.layouts import Emission, emit
from hubtool.ops import convert
from hubtool.ops.execute import execute
from hubtool.ops.target import Target
from hubtool.tensors.dtypes import FLOATS, FROM_TORCH, numel
from hubtool.tensors.expr import Cast, Expr
from hubtool.tensors.writer import write_safetensors
from hubtool.training.config import Output

_ENCODER_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5"}
_FLUX_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "t5"}


@dataclass(frozen=True, slots=True)
class Written:
    """``main``: the adapter, or the tokens' file where that is all; ``others``: further files that belong to it."""

    main: Path
    others: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.main, *self.others)


def planned(output: Output, tokens: tuple[str, ...], *, only_tokens: bool) -> list[Path]:
    """The files that a run will write, the main one first."""
    folder = Path(output.folder)
    named = [_token_file(output, token, tokens, only_tokens) for token in tokens]
    main = folder / (output.name if output.layout == "peft" else f"{output.name}.safetensors")
    return named if only_tokens else [main, *named]


def check(adapter: Adapter, output: Output) -> None:
    """Raise ``LossyConversion`` when the layout cannot hold such an adapter: known before training, not after it."""
    if adapter.patches and not _as_processors(adapter, output):
        _emitted(Adapter(adapter.family, adapter.patches), output.layout)


def named(adapter: Adapter, output: Output) -> Written:
    """The files that ``write`` would write."""
    tokens = tuple(dict.fromkeys(str(one.token) for one in adapter.embeddings))
    main, *others = planned(output, tokens, only_tokens=not adapter.patches)
    return Written(main, tuple(others))


def write(adapter: Adapter, output: Output, metadata: Mapping[str, str], *, force: bool) -> Written:
    """Write everything in ``adapter``. Raises ``LossyConversion`` when the layout cannot hold it, ``WouldOverwrite``."""
    tokens = tuple(dict.fromkeys(str(one.token) for one in adapter.embeddings))
    files = planned(output, tokens, only_tokens=not adapter.patches)
    if adapter.patches:
        _write_patches(Adapter(adapter.family, adapter.patches), files[0], output, metadata, force)
    for path, token in zip(files[-len(tokens) :] if tokens else (), tokens, strict=True):
        own = [one for one in adapter.embeddings if one.token == token]
        write_safetensors(
            path,
            _cast(_tokens(own, adapter.family), output.dtype),
            {**metadata, **canonical_metadata(token, "diffusers" if len(own) == 1 else "kohya-sdxl")},
            force=force,
        )
    return Written(files[0], tuple(files[1:]))


def _write_patches(adapter: Adapter, path: Path, output: Output, metadata: Mapping[str, str], force: bool) -> None:
    if _as_processors(adapter, output):
        write_safetensors(path, _cast(dict(_processors(adapter)), output.dtype), dict(metadata), force=force)
        return
    emission = _emitted(adapter, output.layout)
    if emission.container == "safetensors":
        tensors = _cast(emission.tensors, output.dtype)
        write_safetensors(path, tensors, {**metadata, **emission.metadata}, force=force)
    else:
        _through_diffusers(adapter, path, output, metadata, force)


def _as_processors(adapter: Adapter, output: Output) -> bool:
    """Whether these are whole weights for diffusers, whose form for them is that of Custom Diffusion."""
    return output.layout == "diffusers" and {patch.algorithm for patch in adapter.patches.values()} == {"set"}


def _emitted(adapter: Adapter, layout: str) -> Emission:
    emission = emit(adapter, layout)
    if emission.losses:
        lost = emission.losses[0]
        raise LossyConversion(f"{layout} cannot hold {lost.what}: {lost.reason}", hint="--layout diffusers")
    return emission


def _through_diffusers(adapter: Adapter, path: Path, output: Output, metadata: Mapping[str, str], force: bool) -> None:
    """Layouts in other containers (PEFT's folder) are conversions of a file."""
    emission = emit(adapter, "diffusers")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        first = Path(folder) / "adapter.safetensors"
        write_safetensors(first, _cast(emission.tensors, output.dtype), {**metadata, **emission.metadata})
        execute(convert.plan(open_file(first), Target(layout=output.layout)), path, force=force)


def _processors(adapter: Adapter) -> Iterator[tuple[str, Expr]]:
    """diffusers' own keys of Custom Diffusion weights."""
    for (_, path), patch in adapter.patches.items():
        key = to_processor(f"{path}.weight")
        assert key is not None, path
        yield key, dict(patch.roles())["set_weight"]


def _tokens(own: list[Embedding], family: str | None) -> dict[str, Expr]:
    """One encoder: the token itself is the key, as diffusers has it; several: a key for each, as SDXL's embeddings have."""
    if len(own) == 1:
        return {str(own[0].token): own[0].vectors}
    keys = _FLUX_KEYS if family == "flux1" else _ENCODER_KEYS
    return {keys[str(one.encoder)]: one.vectors for one in own}


def _token_file(output: Output, token: str, tokens: tuple[str, ...], only_tokens: bool) -> Path:
    word = re.sub(r"[^\w.-]+", "", token) or f"token{tokens.index(token)}"
    single = only_tokens and len(tokens) == 1
    return Path(output.folder) / (f"{output.name}.safetensors" if single else f"{output.name}-{word}.safetensors")


def _cast(tensors: Mapping[str, Expr], dtype: str) -> dict[str, Expr]:
    """Every matrix and vector in ``dtype``; scalars such as alpha stay what they are."""
    wanted = FROM_TORCH[dtype]
    return {
        name: Cast(value, wanted)
        if value.dtype in FLOATS and value.dtype != wanted and numel(value.shape) > 1
        else value
        for name, value in tensors.items()
    }
