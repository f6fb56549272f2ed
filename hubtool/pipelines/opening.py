"""A base becomes a pipeline: a diffusers folder, a single file read through hubtool's own tables, or a repository of the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hubtool.errors import MissingExtra, UsageProblem
from hubtool.formats.documents import read_json
from hubtool.pipelines import live, single_file
from hubtool.pipelines.base_families import INDEX
from hubtool.pipelines.outside import explained, quiet

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "PIL")


def need_packages(what: str = "generating", extra: str = "diffusers") -> None:
    """Raise ``MissingExtra`` unless everything that ``what`` (generating, training) imports is installed."""
    from importlib.util import find_spec

    missing = [name for name in _PACKAGES if not find_spec(name)]
    if missing:
        raise MissingExtra(f"{what} ({', '.join(missing)})", extra)


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


def opened(base: str | Path, dtype: Any, *, device: Any = "cpu", config_from: str | Path | None = None) -> Any:
    """The pipeline of ``base`` with its weights in ``dtype``, on ``device``.

    ``base``: a folder, a single file, or a repository id (which diffusers downloads or finds in its cache). ``config_from``: for a
    single file, a diffusers folder of the same family that gives configurations, tokenizers, and components that the file lacks;
    without it configurations come from hubtool's tables, and the rest from the Hub's cache, or from the Hub part by part.
    Raises ``CorruptFile``, ``LoadMismatch`` for weights that do not fit the configurations, ``Unsupported``, ``HubError``.
    """
    with live.aside(), quiet():
        return _opened(Path(base), str(base), dtype, Path(config_from) if config_from else None).to(device)


def _opened(path: Path, base: str, dtype: Any, config_from: Path | None) -> Any:
    if path.is_file():
        return single_file.with_folder(path, config_from, dtype) if config_from else single_file.by_tables(path, dtype)
    with explained(base):
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.from_pretrained(base, torch_dtype=dtype, **_without(path))


def _without(folder: Path) -> dict[str, None]:
    """The parts that a folder says it has not (SD 3 without T5): diffusers opens it only when told so again."""
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    return {name: None for name, home in index.items() if home == [None, None]} if isinstance(index, dict) else {}
