"""Folders that are one artifact: a PEFT adapter, a diffusers pipeline, one component of it, or the output of a training script."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hubtool.errors import CorruptFile, FileError, UnsupportedFile
from hubtool.formats import open_file, sharded
from hubtool.formats.base import TensorFile
from hubtool.formats.documents import is_plain_name, read_json
from hubtool.tensors.ref import TensorRef
from hubtool.types import Finding

ADAPTER_CONFIG = "adapter_config.json"
MODEL_INDEX = "model_index.json"
CONFIG = "config.json"
# Names that training scripts of diffusers give to their one file, best first.
_OUTPUTS = ("pytorch_lora_weights", "learned_embeds", "pytorch_custom_diffusion_weights")
_SUFFIXES = (".safetensors", ".bin")
_CONFIGS = (CONFIG, "scheduler_config.json", "preprocessor_config.json", "tokenizer_config.json", ADAPTER_CONFIG)
_STEM = r"(?:diffusion_pytorch_model|adapter_model|pytorch_model|model)"
_VARIANT = r"(?P<variant>\.[A-Za-z0-9_]+)?"
# variants stand before the last dot, in the name of an index too: model.fp16.safetensors, model.safetensors.index.fp16.json
_WEIGHTS = re.compile(rf"{_STEM}{_VARIANT}\.(?P<kind>safetensors|bin)")
_INDEX = re.compile(rf"{_STEM}\.(?P<kind>safetensors|bin)\.index{_VARIANT}\.json")


def read(path: Path) -> TensorFile:
    """Open a folder as the artifact it is.

    - ``adapter_config.json`` + ``adapter_model.*``: format ``peft-folder``.
    - ``model_index.json``: ``diffusers-folder``; tensors are named ``component/key``, documents ``component/config.json``.
    - ``pytorch_lora_weights.*``, ``learned_embeds.*``, ``pytorch_custom_diffusion_weights.*``: that file itself.
    - ``config.json`` + weights, or weights under an index: ``component-folder``.

    Of several variants of the same weights the plain one is opened, the others are a finding. Raises ``UnsupportedFile`` listing what
    was looked for, and the errors of the files that are opened.
    """
    names = _names(path)
    readers: tuple[Callable[[Path, frozenset[str]], TensorFile | None], ...] = (_peft, _pipeline, _output, _component)
    for reader in readers:
        file = reader(path, names)
        if file is not None:
            return file
    looked = [
        MODEL_INDEX,
        f"{ADAPTER_CONFIG} with adapter_model.*",
        *(f"{stem}.*" for stem in _OUTPUTS),
        f"{CONFIG} with weights",
    ]
    raise UnsupportedFile(f"a folder without {', '.join(looked)}", path=path, hint="name a file in it, or scan it")


def _names(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError as error:
        raise FileError(f"cannot list the folder: {error.strerror}", path=folder) from error


def _peft(path: Path, names: frozenset[str]) -> TensorFile | None:
    weights = _first(names, ("adapter_model",))
    if ADAPTER_CONFIG not in names or weights is None:
        return None
    return _of_weights(path, "peft-folder", open_file(path / weights), {ADAPTER_CONFIG: _object(path / ADAPTER_CONFIG)})


def _output(path: Path, names: frozenset[str]) -> TensorFile | None:
    weights = _first(names, _OUTPUTS)
    if weights is None:
        return None
    file = open_file(path / weights)
    others = [name for stem in _OUTPUTS for suffix in _SUFFIXES if (name := stem + suffix) in names and name != weights]
    if not others:
        return file
    finding = Finding("other-files", "info", f"the folder also holds {', '.join(others)}")
    return replace(file, findings=(*file.findings, finding))


def _first(names: frozenset[str], stems: tuple[str, ...]) -> str | None:
    return next((stem + suffix for stem in stems for suffix in _SUFFIXES if stem + suffix in names), None)


def _component(path: Path, names: frozenset[str]) -> TensorFile | None:
    choices = _choices(names)
    if not choices:
        return None
    return _of_weights(path, "component-folder", _open_best(path, choices), _documents(path, names))


def _of_weights(path: Path, kind: str, file: TensorFile, documents: Mapping[str, Any]) -> TensorFile:
    config = {**file.config, **documents}
    files = (*file.files, *(path / name for name in documents))
    return replace(file, path=path, format=kind, config=config, files=files)


def _pipeline(path: Path, names: frozenset[str]) -> TensorFile | None:
    if MODEL_INDEX not in names:
        return None
    index = _object(path / MODEL_INDEX)
    documents: dict[str, Any] = {MODEL_INDEX: index}
    parts: dict[str, TensorFile] = {}
    for component, folder in _components(path, index):
        inside = _names(folder)
        documents.update({f"{component}/{name}": document for name, document in _documents(folder, inside).items()})
        if choices := _choices(inside):
            parts[component] = _open_best(folder, choices)
    weights = [name for part in parts.values() for name in part.files]
    return TensorFile(
        path,
        "diffusers-folder",
        sum(part.size for part in parts.values()),
        dict(_prefixed(parts)),
        findings=tuple(
            replace(finding, message=f"{name}: {finding.message}")
            for name, part in parts.items()
            for finding in part.findings
        ),
        config=documents,
        files=(*weights, *(path / name for name in documents)),
    )


def _components(path: Path, index: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """Sub-folders that the index names with a class. ``[null, null]`` is a component the pipeline goes without."""
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2 and value[1] is not None:
            if not is_plain_name(name):
                raise CorruptFile(f"{MODEL_INDEX} names a component {name[:80]!a}", path=path / MODEL_INDEX)
            if (path / name).is_dir():
                yield name, path / name


def _prefixed(parts: Mapping[str, TensorFile]) -> Iterator[tuple[str, TensorRef]]:
    for component, part in parts.items():
        for key, ref in part.tensors.items():
            name = f"{component}/{key}"
            yield name, replace(ref, name=name)


def _choices(names: frozenset[str]) -> list[str]:
    """Names of whole weights, best first: without variant, safetensors, unsharded."""
    found = []
    for name in sorted(names):
        match = _WEIGHTS.fullmatch(name) or _INDEX.fullmatch(name)
        if match is not None:
            found.append(((match["variant"] is not None, match["kind"] != "safetensors", name.endswith(".json")), name))
    return [name for _, name in sorted(found)]


def _open_best(folder: Path, choices: list[str]) -> TensorFile:
    best, *others = choices
    # by name and not through open_file: an index with a variant ends in .fp16.json
    file = sharded.read(folder / best) if best.endswith(".json") else open_file(folder / best)
    if not others:
        return file
    finding = Finding("variants", "info", f"{best} was read; {', '.join(others)} lie beside it")
    return replace(file, findings=(*file.findings, finding))


def _documents(folder: Path, names: frozenset[str]) -> dict[str, Any]:
    return {name: _object(folder / name) for name in _CONFIGS if name in names}


def _object(path: Path) -> dict[str, Any]:
    document = read_json(path)
    if not isinstance(document, dict):
        raise CorruptFile("not a JSON object", path=path)
    return document
