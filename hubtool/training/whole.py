"""All weights as a result: a diffusers folder, a single checkpoint file, or what sets them apart from the base as an adapter."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hubtool.errors import UsageProblem, WouldOverwrite
from hubtool.formats import open_file
from hubtool.ops import convert
from hubtool.ops.execute import execute
from hubtool.ops.plan import Plan
from hubtool.ops.target import Target
from hubtool.pipelines import live
from hubtool.tensors.atomic import atomic_folder
from hubtool.training.config import Config, Output
from hubtool.training.parts.weights import WeightsPart
from hubtool.training.result import Written

_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_INDEX = "model_index.json"


def check(config: Config, trains: bool) -> None:
    """Raise ``UsageProblem`` where ``adapter.full`` means nothing. ``trains``: whether the method can train all weights."""
    if config.adapter.full and not trains:
        raise UsageProblem(f"{config.method} does not train all weights", hint="hubtool train dreambooth does")
    if config.adapter.full and config.adapter.start:
        raise UsageProblem("all weights start from the base, not from an adapter", hint="leave out adapter.start")


def planned(output: Output) -> Path:
    """The folder or file that will be written."""
    folder = output.form == "folder" or (output.form == "extract" and output.layout == "peft")
    return Path(output.folder) / (output.name if folder else f"{output.name}.safetensors")


def write(pipe: Any, part: WeightsPart, config: Config, notes: Mapping[str, str], *, force: bool) -> Written:
    """Write what was trained in ``config.output.form``, rounded to its dtype.

    A folder and a single file hold the whole pipeline. Raises ``WouldOverwrite``, and what converting and extracting raise.
    """
    path = planned(config.output)
    if path.exists() and not force:
        raise WouldOverwrite("there is a result already", path=path, hint="--force replaces it")
    part.round(config.output.dtype)
    _FORMS[config.output.form](pipe, part, config, path, notes)
    return Written(path)


def _folder(pipe: Any, part: WeightsPart, config: Config, path: Path, notes: Mapping[str, str]) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with atomic_folder(path) as made, live.aside():
        pipe.save_pretrained(made)


def _file(pipe: Any, part: WeightsPart, config: Config, path: Path, notes: Mapping[str, str]) -> None:
    with _beside(path) as folder:
        with live.aside():
            pipe.save_pretrained(folder)
        _put(convert.plan(open_file(folder), Target(format="safetensors")), path, notes)


def _extract(pipe: Any, part: WeightsPart, config: Config, path: Path, notes: Mapping[str, str]) -> None:
    """Both sides lie on disk for a moment: the decomposition reads them module by module."""
    from hubtool.ops.extract import planning
    from hubtool.ops.extract.request import Request
    from hubtool.ops.extract.scratch import Scratch
    from hubtool.ops.factor_space.budget import Budget
    from hubtool.ops.sides import sides

    asked = config.adapter
    request = Request(
        kind="locon" if asked.conv_rank else "lora", budget=Budget(rank=asked.rank), conv_rank=asked.conv_rank or None,
        layout=config.output.layout, dtype=_DTYPES[config.output.dtype], seed=config.run.seed, workers=1,
    )  # fmt: skip
    with _beside(path) as tuned, _beside(path) as base, Scratch(path.parent) as scratch:
        _save(pipe, part, tuned)
        with part.untrained():
            _save(pipe, part, base)
        first, second = sides([open_file(base), open_file(tuned)])
        plan, _ = planning.extract(planning.prepare(first, second, request), scratch)
        _put(plan, path, notes)


_FORMS = {"folder": _folder, "file": _file, "extract": _extract}


def _put(plan: Plan, path: Path, notes: Mapping[str, str]) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    execute(replace(plan, metadata={**plan.metadata, **notes}), path, force=True)


def _save(pipe: Any, part: WeightsPart, folder: Path) -> None:
    """A diffusers folder of the trained components alone."""
    index = json.loads(pipe.to_json_string())
    kept = {name: value for name, value in index.items() if name.startswith("_") or name in part.models}
    (folder / _INDEX).write_text(json.dumps(kept), encoding="utf-8")
    with live.aside():
        for name, model in part.models.items():
            model.save_pretrained(folder / name)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A folder on the same disk that goes away again."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as name:
        yield Path(name)
