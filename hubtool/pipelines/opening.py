"""A base becomes a pipeline: a diffusers folder, a single file read through hubtool's own tables, or a repository of the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hubtool.errors import (
    ConversionError,
    CorruptFile,
    FileError,
    HubError,
    LoadMismatch,
    MissingExtra,
    RecognitionError,
    Unsupported,
    UsageProblem,
)
from hubtool.formats import open_file
from hubtool.formats.base import TensorFile
from hubtool.formats.documents import read_json
from hubtool.layouts import checkpoints
from hubtool.layouts.checkpoint_source import recognise
from hubtool.layouts.identify import identify
from hubtool.pipelines import live
from hubtool.tensors.evaluate import compute
from hubtool.tensors.expr import Read

BASES = ("checkpoint", "diffusers_pipeline")
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_SINGLE = {
    "sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline", "flux1": "FluxPipeline",
}  # fmt: skip
_INDEX = "model_index.json"
_DERIVED = ("position_ids",)  # saved by old versions, computed by new ones
_SHOWN = 3


def need_packages() -> None:
    """Raise ``MissingExtra`` unless everything that generating imports is installed."""
    from importlib.util import find_spec

    names = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "PIL")
    missing = [name for name in names if not find_spec(name)]
    if missing:
        raise MissingExtra(f"generating ({', '.join(missing)})", "diffusers")


def base_families(path: Path) -> tuple[str, ...]:
    """The families that a local base may be of: one, where it can be told. Raises ``Unsupported`` for what is no base; reads headers only."""
    file = open_file(path)
    found = identify(file)
    if found.kind not in BASES:
        raise Unsupported(f"a {found.kind} makes no pictures by itself", path=path, hint=f"hubtool inspect {path}")
    if found.family:
        return (found.family,)
    try:
        source = recognise(file)
    except (RecognitionError, ConversionError):
        source = None
    return found.family_candidates if source is None else (source.pipeline.family,)


def place(device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """(device, dtype): the best there is; fp32 outside of CUDA. Raises ``UsageProblem`` for what is not there."""
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    wanted = next(name for name in ("cuda", "mps", "cpu") if there[name]) if device == "auto" else device
    try:
        chosen = torch.device(wanted)
    except RuntimeError:
        raise UsageProblem(f"{wanted!r} is no device", hint="auto, cpu, cuda, cuda:1 or mps") from None
    if not there.get(chosen.type, True):
        raise UsageProblem(f"there is no {chosen.type} here", hint="--device cpu")
    return chosen, getattr(torch, _dtype(dtype, chosen.type))


def _dtype(asked: str, device: str) -> str:
    import torch

    if asked == "auto":
        asked = "fp32" if device != "cuda" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if asked not in DTYPES:
        raise UsageProblem(f"{asked!r} is no dtype to compute in", hint=f"auto, {', '.join(DTYPES)}")
    return DTYPES[asked]


def opened(base: str | Path, dtype: Any, *, device: Any = "cpu", config_from: Path | None = None) -> Any:
    """The pipeline of ``base`` with its weights in ``dtype``, on ``device``.

    ``base``: a folder, a single file, or a repository id (which diffusers downloads or finds in its cache). ``config_from``: for a
    single file, a diffusers folder of the same family that gives configurations, tokenizers, and components that the file lacks.
    Raises ``CorruptFile``, ``LoadMismatch`` for weights that do not fit the configurations, ``HubError``.
    """
    with live.aside(), quiet():
        return _opened(Path(base), str(base), dtype, config_from).to(device)


def _opened(path: Path, base: str, dtype: Any, config_from: Path | None) -> Any:
    if path.is_file():
        return _of_file(path, dtype, config_from)
    with _explained(base):
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.from_pretrained(base, torch_dtype=dtype)


def _of_file(path: Path, dtype: Any, config_from: Path | None) -> Any:
    import diffusers

    if config_from is None:
        with _explained(path, hint="without the Hub, --config-from FOLDER gives the configurations and tokenizers"):
            return getattr(diffusers, _single(path)).from_single_file(str(path), torch_dtype=dtype)
    file = open_file(path)
    made = _components(file, config_from, dtype)
    with _explained(config_from):
        return diffusers.DiffusionPipeline.from_pretrained(str(config_from), torch_dtype=dtype, **made)


def _single(path: Path) -> str:
    families = base_families(path)
    classes = {_SINGLE.get(family) for family in families}
    if len(classes) != 1 or None in classes:
        raise Unsupported(
            f"diffusers cannot be told how to open a single file of {' or '.join(families) or 'an unknown family'}",
            path=path, hint="--config-from FOLDER: a diffusers folder of the same family",
        )  # fmt: skip
    return str(classes.pop())


def _components(file: TensorFile, folder: Path, dtype: Any) -> dict[str, Any]:
    """Component -> the model that the single file holds, built after the folder's configuration."""
    index = read_json(folder / _INDEX)
    if not isinstance(index, dict):
        raise CorruptFile("this is no index of a pipeline", path=folder / _INDEX)
    source = recognise(file)
    if source is None:
        raise Unsupported("no denoiser is in this file", path=file.path, hint=f"hubtool inspect {file.path}")
    found = checkpoints.read({key: Read(ref) for key, ref in source.tensors.items()}, source.pipeline, source.slots)
    made = {}
    for name, weights in found.weights.items():
        home = index.get(name)
        if isinstance(home, list) and len(home) == 2 and isinstance(home[1], str) and home[1]:
            made[name] = _model(
                folder / name, str(home[0]), home[1], {k: compute(t) for k, t in weights.items()}, dtype
            )
    return made


def _model(folder: Path, library: str, cls: str, state: Mapping[str, Any], dtype: Any) -> Any:
    """A model of diffusers or transformers with these weights. Memory for the weights is taken once."""
    import diffusers
    import transformers
    from accelerate import init_empty_weights

    home: Any = {"diffusers": diffusers, "transformers": transformers}.get(library)
    kind = getattr(home, cls, None)
    if kind is None:
        raise Unsupported(f"{library} has no class {cls}", path=folder / "config.json")
    with _explained(folder), init_empty_weights(include_buffers=False):
        if library == "diffusers":
            model = kind.from_config(kind.load_config(str(folder)))
        else:
            model = kind(kind.config_class.from_pretrained(str(folder)))
    _fill(model, {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}, folder)
    return model.eval()


def _fill(model: Any, state: Mapping[str, Any], folder: Path) -> None:
    """Give ``model`` its weights; every tensor must have a place, every parameter a tensor."""
    flat = not any(name.startswith("text_model.") for name in model.state_dict())
    own = {key.removeprefix("text_model.") if flat else key: value for key, value in state.items()}
    try:
        unused = model.load_state_dict(own, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:
        raise LoadMismatch(f"the weights do not fit this configuration: {error}", path=folder) from error
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    wrong = [
        *(f"no place for {key}" for key in unused if not key.endswith(_DERIVED)),
        *(f"no {key}" for key in missing),
    ]
    if wrong:
        raise LoadMismatch(f"the weights do not fit this configuration: {', '.join(wrong[:_SHOWN])}", path=folder)


@contextmanager
def _explained(base: str | Path, hint: str | None = None) -> Iterator[None]:
    """What diffusers, transformers and the Hub's client raise, in our words."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        said = str(error).strip().splitlines()
        told = f"diffusers cannot open this base: {said[0] if said else type(error).__name__}"
        if isinstance(error, OSError) and not Path(base).exists():
            raise HubError(told, hint="hubtool needs a network, or the repository in the Hub's cache") from error
        kind = FileError if hint else CorruptFile
        raise kind(told, path=base, hint=hint) from error


@contextmanager
def quiet() -> Iterator[None]:
    """diffusers' own progress bars and advice would go through the talk of the command line."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    shown = logging.is_progress_bar_enabled() if hasattr(logging, "is_progress_bar_enabled") else True
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
