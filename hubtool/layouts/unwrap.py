"""Takes a pickled checkpoint out of its wrappers (``state_dict``, ``params_ema`` ...) and tells what was left behind.

Facts: spec/artefacts.md A.3. Only names change; references keep pointing at the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from hubtool.formats.base import TensorFile
from hubtool.tensors.ref import TensorRef
from hubtool.types import Finding

# In order of preference: an EMA copy is what the author meant people to use.
_WRAPPERS = ("state_dict", "params_ema", "params", "model_ema", "ema", "model", "module", "adapter")
# What trainers keep beside the weights; it may contain tensors and is never part of the artifact.
_TRAINER_STATE = frozenset({
    "optimizer_states", "optimizer_state_dict", "optimizer", "optimizers", "opt", "lr_schedulers", "lr_scheduler", "scheduler",
    "loops", "callbacks", "epoch", "global_step", "step", "iter", "iteration", "hyper_parameters", "hparams", "hparams_name",
    "config", "cfg", "args", "arch", "version", "pytorch-lightning_version", "rng_state", "random_states", "best_score",
})  # fmt: skip
_DEPTH = 8


def unwrapped(file: TensorFile) -> tuple[Mapping[str, TensorRef], tuple[Finding, ...]]:
    """Return the tensors under the innermost wrapper, and info findings for the parts that were dropped.

    A file without wrappers, and every file that is no pickle, comes back as it is.
    """
    view, findings = unwrap(file)
    return view.tensors, findings


def unwrap(file: TensorFile) -> tuple[TensorFile, tuple[Finding, ...]]:
    """The same as a ``TensorFile`` whose ``tensors`` and ``structure`` start inside the wrappers. Idempotent."""
    structure: Any = file.structure
    path: list[str] = []
    dropped: list[str] = []
    while isinstance(structure, Mapping) and len(path) < _DEPTH:
        key = _wrapper(structure)
        if key is None:
            break
        dropped += [f"{'.'.join([*path, str(other)])}" for other in structure if other != key]
        path.append(key)
        structure = structure[key]
    if not path:
        return file, ()
    prefix = ".".join(path) + "."
    tensors = {name.removeprefix(prefix): ref for name, ref in file.tensors.items() if name.startswith(prefix)}
    view = replace(file, tensors=MappingProxyType(tensors), structure=structure)
    return view, (_unwrapped(path), *_dropped(dropped))


def _wrapper(structure: Mapping[Any, Any]) -> str | None:
    """The key to step into: a known wrapper that holds tensors, with nothing beside it but other wrappers and trainer state."""
    holders = [key for key in _WRAPPERS if isinstance(structure.get(key), Mapping) and has_tensors(structure[key])]
    if not holders:
        return None
    key = holders[0]
    others = (other for other in structure if other not in holders and other not in _TRAINER_STATE)
    # ``state_dict`` means one thing only; the other words are also names of modules.
    return key if key == "state_dict" or not any(has_tensors(structure[other]) for other in others) else None


def has_tensors(value: Any) -> bool:
    """Whether a tensor lies anywhere in an inert object. Shared and cyclic parts are visited once."""
    pending, seen = [value], set()
    while pending:
        item = pending.pop()
        if isinstance(item, TensorRef):
            return True
        children = item.values() if isinstance(item, Mapping) else item if isinstance(item, list | tuple) else None
        if children is not None and id(item) not in seen:
            seen.add(id(item))
            pending.extend(children)
    return False


def _unwrapped(path: list[str]) -> Finding:
    return Finding("unwrapped", "info", f"the tensors lie under {'.'.join(path)}")


def _dropped(names: list[str]) -> tuple[Finding, ...]:
    if not names:
        return ()
    sample = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return (Finding("dropped-parts", "info", f"trainer state and copies that are not part of the artifact: {sample}"),)
