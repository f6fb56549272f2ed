"""PNG files that say how they were made: A1111's ``parameters`` text, and the same as JSON under ``hubtool.recipe``."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hubtool.errors import CorruptFile, FileMissing, NotFound
from hubtool.pipelines.generating import Request
from hubtool.tensors.atomic import atomic_file
from hubtool.tensors.strict_json import JsonError, loads

KEYWORD = "hubtool.recipe"
_PARAMETERS = "parameters"
_DEEPEST = 8
_SHORT = 10  # digits of a hash that A1111 shows


@dataclass(frozen=True, slots=True)
class Part:
    """A base, an adapter, or an embedding of the ``negative`` prompt; ``name`` is a file's or a repository's, never a whole path.

    ``schedule``: how the strength changes from step to step, in the words of ``curves``. ``settings``: what else its kind has to be
    set; a file is ``{"name", "sha256"}``.
    """

    name: str
    sha256: str | None = None
    family: str | None = None
    kind: str | None = None
    strength: float = 1.0
    negative: bool = False
    schedule: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that it takes to make the picture again. ``seeds`` of ``request``: those of this picture (several for a grid).

    ``sampler``: class of the scheduler.
    """

    base: Part
    adapters: tuple[Part, ...]
    request: Request
    device: str = "cpu"
    dtype: str = "float32"
    sampler: str | None = None
    grid: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"operation": "generate", **asdict(self)}


def save(image: Any, path: Path, recipe: Recipe, *, force: bool = False) -> int:
    """Write a PIL picture as PNG with its recipe, whole or not at all; returns its size. Raises ``WouldOverwrite``, ``FileError``."""
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_text(_PARAMETERS, parameters(recipe))
    texts.add_itxt(KEYWORD, json.dumps(recipe.to_json(), ensure_ascii=False, separators=(",", ":")))
    stream = io.BytesIO()
    image.save(stream, "PNG", pnginfo=texts)
    with atomic_file(path, len(stream.getvalue()), force=force) as out:
        out.write(stream.getvalue())
    return len(stream.getvalue())


def read(path: Path) -> Recipe:
    """The recipe in a picture that hubtool made. Raises ``NotFound`` for a picture without one, ``CorruptFile``, ``FileMissing``."""
    text = _texts(path).get(KEYWORD)
    if text is None:
        raise NotFound("this picture keeps no recipe of hubtool", hint="only PNG files as generate writes them do")
    try:
        return _recipe(loads(str(text).encode(), max_depth=_DEEPEST))
    except (JsonError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFile(f"the recipe in this picture is damaged: {error}", path=path) from error


def _texts(path: Path) -> dict[str, Any]:
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise FileMissing("no such picture", path=path)
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return dict(image.text)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CorruptFile(f"this is no readable PNG: {error}", path=path) from error


def _recipe(document: Any) -> Recipe:
    words = {name: document[name] for name in ("device", "dtype", "sampler", "versions")}
    texts = [words["device"], words["dtype"], words["sampler"] or "", *words["versions"].values()]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("the recipe has words of the wrong type")
    parts = tuple(map(_part, document["adapters"]))
    grid = _grid(document["grid"])
    return Recipe(_part(document["base"]), parts, _request(document["request"]), grid=grid, **words)


def _grid(document: Any) -> Mapping[str, Any] | None:
    if document is None:
        return None
    strengths = [float(value) for value in document.get("strengths", ())]
    if not all(map(math.isfinite, strengths)):
        raise ValueError("a strength is no number")
    return {"of": "strengths", "strengths": strengths} if strengths else {"of": "adapters"}


def _part(document: Any) -> Part:
    part = Part(**document)
    texts = (part.name, part.sha256 or "", part.family or "", part.kind or "", part.schedule or "")
    if any(not isinstance(text, str) for text in texts) or not isinstance(part.negative, bool):
        raise TypeError("a part of the recipe has words of the wrong type")
    if not math.isfinite(part.strength):
        raise ValueError("a strength is no number")
    if not isinstance(part.settings, dict) or not all(map(_is_setting, part.settings.values())):
        raise TypeError("the settings of an adapter have values of the wrong type")
    return part


def _is_setting(value: Any) -> bool:
    """A number, on or off, nothing, or a file by name and hash."""
    if isinstance(value, dict):
        return value.keys() == {"name", "sha256"} and all(isinstance(text, str) for text in value.values())
    return value is None or (isinstance(value, bool | int | float) and math.isfinite(value))


def _request(document: Any) -> Request:
    wanted: dict[str, tuple[type, ...]] = {
        "prompt": (str,), "negative": (str,), "scheduler": (str,), "seeds": (list,), "steps": (int,), "batch": (int,),
        "width": (int,), "height": (int,), "guidance": (int, float), "true_cfg": (int, float),
    }  # fmt: skip
    for name, value in document.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, wanted[name])):
            raise TypeError(f"{name} is {value!r}")
    if not all(isinstance(seed, int) for seed in document["seeds"]):
        raise TypeError("a seed is no number")
    return Request(**{**document, "seeds": tuple(document["seeds"])})


def parameters(recipe: Recipe) -> str:
    """The recipe as A1111 writes it: prompt, negative prompt, one line of ``Key: value``."""
    asked = recipe.request
    loras = [one for one in recipe.adapters if one.kind == "lora"]
    prompt = " ".join([asked.prompt, *(f"<lora:{Path(one.name).stem}:{one.strength:g}>" for one in loras)])
    negative = [f"Negative prompt: {asked.negative}"] if asked.negative else []
    hashes = ", ".join(f"{Path(one.name).stem}: {one.sha256[:_SHORT]}" for one in loras if one.sha256)
    facts: dict[str, Any] = {
        "Steps": asked.steps, "Sampler": recipe.sampler, "CFG scale": asked.guidance,
        "Seed": ", ".join(map(str, asked.seeds)) if len(asked.seeds) == 1 else f'"{", ".join(map(str, asked.seeds))}"',
        "Size": f"{asked.width}x{asked.height}" if asked.width and asked.height else None,
        "Model hash": recipe.base.sha256[:_SHORT] if recipe.base.sha256 else None, "Model": Path(recipe.base.name).stem,
        "Lora hashes": f'"{hashes}"' if hashes else None, "Version": f"hubtool {recipe.versions.get('hubtool', '')}".strip(),
    }  # fmt: skip
    line = ", ".join(f"{name}: {value}" for name, value in facts.items() if value is not None)
    return "\n".join([prompt, *negative, line])
