"""Checkpoints: a folder that appears whole or not at all, without pickles. ``state.safetensors`` holds tensors, ``state.json`` the rest."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hubtool.errors import CorruptFile, UsageProblem
from hubtool.tensors.atomic import atomic_folder
from hubtool.training.average import Average
from hubtool.training.config import Config, binding

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8})")
_TENSORS, _REST = "state.safetensors", "state.json"


def write(
    config: Config, step: int, parameters: Mapping[str, Any], optimiser: Any, average: Average, rest: Any
) -> Path:
    """Write the state after ``step`` steps, then remove checkpoints beyond ``run.checkpoints_kept``."""
    from safetensors.torch import save_file

    root = Path(config.output.folder) / FOLDER
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"step-{step:08}"
    if not path.exists():
        tensors, told = _state(parameters, optimiser, average)
        document = {"version": 1, "step": step, "binding": binding(config), "optimiser": told, "rest": rest}
        with atomic_folder(path) as part:
            save_file(tensors, part / _TENSORS)
            (part / _REST).write_text(json.dumps(document), encoding="utf-8")
    for old in _present(root)[: -config.run.checkpoints_kept]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def newest(config: Config) -> Path | None:
    """The checkpoint with most steps, None where there is none."""
    found = _present(Path(config.output.folder) / FOLDER)
    return found[-1] if found else None


def read(
    path: Path, config: Config, parameters: Mapping[str, Any], optimiser: Any, average: Average
) -> tuple[int, Any]:
    """Put a checkpoint's state in place; (steps done, the rest).

    Raises ``UsageProblem`` when the configuration would compute something else, ``CorruptFile`` for a checkpoint that does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        document = json.loads((path / _REST).read_text(encoding="utf-8"))
        tensors = load_file(path / _TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CorruptFile(f"this is no whole checkpoint: {error}", path=path) from error
    _same(document.get("binding", {}), binding(config), path)
    _restore(path, tensors, document["optimiser"], parameters, optimiser, average)
    return int(document["step"]), document["rest"]


def _state(parameters: Mapping[str, Any], optimiser: Any, average: Average) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors by name, and the numbers of the optimiser that are no tensors."""
    import torch

    names, state = list(parameters), optimiser.state_dict()
    tensors = {f"parameter/{name}": value for name, value in parameters.items()}
    tensors |= {f"average/{name}": value for name, value in average.held.items()}
    numbers: dict[str, dict[str, Any]] = {}
    for at, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"moment/{key}/{names[at]}"] = value
            else:
                numbers.setdefault(names[at], {})[key] = value
    groups = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    return plain, {"numbers": numbers, "groups": groups}


def _restore(
    path: Path, tensors: dict[str, Any], told: Any, parameters: Mapping[str, Any], optimiser: Any, average: Average
) -> None:
    import torch

    wanted = {f"parameter/{name}": value for name, value in parameters.items()}
    wanted |= {f"average/{name}": value for name, value in average.held.items()}
    wrong = [name for name, value in wanted.items() if name not in tensors or tensors[name].shape != value.shape]
    if wrong:
        raise CorruptFile(f"this checkpoint is of other parameters: {wrong[0]}", path=path)
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(tensors[name])
    state: dict[int, dict[str, Any]] = {}
    for at, name in enumerate(parameters):
        state[at] = dict(told["numbers"].get(name, {}))
    places = {name: at for at, name in enumerate(parameters)}
    for full, value in tensors.items():
        kind, _, rest = full.partition("/")
        if kind == "moment":
            key, _, name = rest.partition("/")
            state[places[name]][key] = value
    groups = [
        {**row, **group} for row, group in zip(optimiser.state_dict()["param_groups"], told["groups"], strict=True)
    ]
    optimiser.load_state_dict({"state": {at: row for at, row in state.items() if row}, "param_groups": groups})


def _same(then: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    changed = [
        f"{name} was {then.get(name)}, now {now.get(name)}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]
    if changed:
        raise UsageProblem(
            f"{path.name} belongs to another run: {'; '.join(changed[:5])}",
            hint="resume with the same configuration, or train into another folder",
        )


def _present(root: Path) -> list[Path]:
    """Whole checkpoints, oldest first; parts of interrupted writes have other names."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _NAME.fullmatch(path.name) and (path / _REST).is_file())
