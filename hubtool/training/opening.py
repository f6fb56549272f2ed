"""The base: its family is told, and refused where it does not fit, before weights are downloaded or loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hubtool.errors import CorruptFile, FileMissing, HubError, LoadMismatch, MissingExtra, Unsupported, UsageProblem
from hubtool.formats import open_file
from hubtool.layouts.identify import identify
from hubtool.pipelines import live
from hubtool.pipelines.families import family_of

_SINGLE = {
    "sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline", "flux1": "FluxPipeline",
}  # fmt: skip
_WHOLE = ("checkpoint", "diffusers_pipeline")


def need_packages() -> None:
    """Raise ``MissingExtra`` unless everything that training imports is installed."""
    from importlib.util import find_spec

    missing = [
        name
        for name in ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "PIL")
        if not find_spec(name)
    ]
    if missing:
        raise MissingExtra(f"training ({', '.join(missing)})", "train")


def family(base: str) -> str | None:
    """Family of a base, from its own words and shapes: a local folder or file, or a repository whose ``model_index.json`` is read.

    Raises ``UsageProblem`` without a base, ``Unsupported`` for what is no base, ``FileMissing``, ``HubError``.
    """
    if not base:
        raise UsageProblem("no base is named", hint="--base FOLDER, REPOSITORY or FILE")
    path = Path(base)
    if path.exists():
        found = identify(open_file(path))
        if found.kind not in _WHOLE:
            raise Unsupported(f"a {found.kind} is no base to train on", path=path, hint=f"hubtool inspect {path}")
        return found.family
    if path.is_absolute() or base.count("/") != 1:
        raise FileMissing("there is no such base", path=path)
    return _announced(base)


def check(base: str, families: Collection[str], method: str) -> str | None:
    """The family of ``base``. Raises ``LoadMismatch`` for one that ``method`` does not fit, and what ``family`` raises."""
    found = family(base)
    if found is not None and found not in families:
        raise LoadMismatch(f"{method} does not fit {found}, which {base} is", hint=f"families: {', '.join(families)}")
    return found


def opened(base: str, families: Collection[str], method: str, dtype: Any) -> Any:
    """The pipeline of ``base`` with its weights in ``dtype``. Raises what ``check`` raises, ``CorruptFile``."""
    import diffusers

    found = check(base, families, method)
    path = Path(base)
    try:
        with live.aside(), _without_bars():
            if path.is_file():
                cls = getattr(diffusers, _single(path, found))
                return cls.from_single_file(base, torch_dtype=dtype)
            return diffusers.DiffusionPipeline.from_pretrained(base, torch_dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise CorruptFile(f"diffusers cannot open this base: {error}", path=base) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """diffusers' own progress bars would go through the talk of the command line."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled() if hasattr(logging, "is_progress_bar_enabled") else True
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _single(path: Path, found: str | None) -> str:
    if found not in _SINGLE:
        raise Unsupported("the family of this checkpoint cannot be told", path=path, hint=f"hubtool explain {path}")
    inpainting = any(
        name.endswith("input_blocks.0.0.weight") and ref.shape[1:2] == (9,)
        for name, ref in open_file(path).tensors.items()
    )
    return _SINGLE[found].replace("Pipeline", "InpaintPipeline") if inpainting else _SINGLE[found]


def _announced(base: str) -> str | None:
    """What the class named in a repository's ``model_index.json`` says, with the UNet's config where classes are shared."""
    import json

    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise MissingExtra("a base of the Hub", "hub") from None

    def document(name: str) -> dict[str, Any]:
        try:
            return dict(json.loads(Path(hf_hub_download(base, name)).read_text(encoding="utf-8")))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise HubError(f"{base} cannot be asked what it is: {error}") from error

    index = document("model_index.json")
    parts: dict[str, Any] = {}
    if "unet" in index:
        parts["unet"] = type("UNet", (), {"config": document("unet/config.json")})()
    return family_of(type(str(index.get("_class_name", "")), (), parts)())
