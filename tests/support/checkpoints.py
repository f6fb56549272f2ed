"""Tiny pipelines as folders and single files, and what diffusers' own converters make of the latter."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hubtool.formats import open_file
from hubtool.ops.checkpoints import plan
from hubtool.ops.execute import execute
from hubtool.ops.execute_folder import execute_folder
from hubtool.ops.folder_plan import FolderPlan
from hubtool.ops.plan import Plan
from hubtool.ops.target import Target
from tests.support.tiny import build

State = dict[str, torch.Tensor]


@cache
def pipeline(family: str) -> Any:
    return build(family)


def saved(family: str, folder: Path) -> Path:
    """A tiny pipeline as diffusers saves it."""
    path = folder / family
    pipeline(family).save_pretrained(path)
    return path


def convert(source: Path, output: Path, layout: str | None, *, base: Path | None = None, **target: Any) -> Plan:
    """Plan and run a conversion."""
    made = plan(open_file(source), Target(layout=layout, **target), config_from=base)
    assert made is not None
    if isinstance(made, FolderPlan):
        execute_folder(made, output)
    else:
        execute(made, output)
    return made


def single(family: str, folder: Path, layout: str = "single-file", metadata: Mapping[str, str] | None = None) -> Path:
    """A single file of a tiny pipeline, as another program would write it: no receipt, tensors by name."""
    made = folder / f"{family}.made.safetensors"
    convert(saved(family, folder), made, layout, family=family)
    path = folder / f"{family}.safetensors"
    save_file(load_file(made), path, {"format": "pt", **(metadata or {})})
    return path


def states(family: str) -> dict[str, State]:
    """Component -> name in the published folders -> tensor."""
    pipe = pipeline(family)
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {name: dict(_published(part)) for name, part in models.items()}


def _published(model: Any) -> Any:
    """transformers >= 5.6 drops ``text_model.``; tied tables are saved once."""
    flat = type(model).__name__ == "CLIPTextModel"
    for key, tensor in model.state_dict().items():
        if key != "encoder.embed_tokens.weight":
            yield (f"text_model.{key}" if flat and not key.startswith("text_model.") else key), tensor


def loaded(folder: Path) -> dict[str, State]:
    """Component -> key -> tensor of a folder's weights files."""
    files = sorted(folder.glob("*/*.safetensors"))
    states: dict[str, State] = {}
    for path in files:
        states.setdefault(path.parent.name, {}).update(load_file(path))
    return states


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
