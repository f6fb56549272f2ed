"""A single file becomes a pipeline through hubtool's own tables: they name its parts, and configure them by what the weights say.

diffusers' ``from_single_file`` asks the Hub for configurations; nothing here does. What the file lacks comes from a folder that the user
names, or from the Hub's cache (``cached_parts``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubtool.errors import LoadMismatch, UnknownFamily, Unsupported
from hubtool.formats import open_file
from hubtool.formats.documents import read_json
from hubtool.layouts import checkpoint_config as configs
from hubtool.layouts import checkpoints
from hubtool.layouts.checkpoint_source import Source, recognise
from hubtool.layouts.checkpoint_tables import DENOISERS, Pipeline
from hubtool.pipelines import base_families, cached_parts
from hubtool.pipelines.outside import explained
from hubtool.tensors.evaluate import compute
from hubtool.tensors.expr import Expr, Read

_DERIVED = ("position_ids",)  # saved by old versions, computed by new ones
_SHOWN = 3
_FOLDER = "--config-from FOLDER: a diffusers folder of the same family"
_T5_OF_SD3 = ("text_encoder_3", "tokenizer_3")
Weights = Mapping[str, Expr]


@dataclass(frozen=True, slots=True)
class Single:
    """``weights``: component -> canonical key -> tensor."""

    path: Path
    source: Source
    weights: Mapping[str, Weights]

    @property
    def table(self) -> Pipeline:
        return self.source.pipeline

    @property
    def cls(self) -> str:
        """Class of the pipeline: the variant's, where the file is one (inpainting)."""
        return self.table.class_for(self.source.variants)


def read(path: Path, family: str | None = None) -> Single:
    """Tell the parts of a single file apart; ``family`` settles what it may be of several. Raises ``Unsupported``, ``ConversionError``."""
    file = open_file(path)
    try:
        source = recognise(file)
    except UnknownFamily as error:
        if family is None:
            raise UnknownFamily(error.message, path=path, hint=_FOLDER) from error
        source = recognise(file, family)
    if source is None or (source.component is not None and source.pipeline.cls):
        raise Unsupported("no denoiser is in this file", path=path, hint=f"hubtool inspect {path}")
    found = checkpoints.read({key: Read(ref) for key, ref in source.tensors.items()}, source.pipeline, source.slots)
    return Single(path, source, found.weights)


def with_folder(path: Path, folder: Path, dtype: Any) -> Any:
    """The pipeline of ``path`` with configurations, tokenizers, and the parts that it lacks from a diffusers folder.

    Raises ``LoadMismatch`` for weights that do not fit these configurations, ``CorruptFile``.
    """
    import diffusers

    family = base_families.of_index(folder)
    single = read(path, family)
    if family is not None and family != single.table.family:
        raise LoadMismatch(
            f"configurations of {family} do not fit a checkpoint of {single.table.family}", path=folder, hint=_FOLDER
        )
    index = read_json(folder / base_families.INDEX)
    made = {}
    for name, weights in single.weights.items():
        home = index.get(name)
        if isinstance(home, list) and len(home) == 2 and all(isinstance(word, str) and word for word in home):
            maker = _of_folder(home[0], home[1], folder / name, _told(weights))
            made[name] = _filled(maker, weights, dtype, folder / name, single.table.components[name].identity)
    cls = single.cls if single.cls != single.table.cls else "DiffusionPipeline"
    with explained(folder):
        return getattr(diffusers, cls).from_pretrained(str(folder), torch_dtype=dtype, **made)


def _told(weights: Weights) -> dict[str, Any]:
    """What the weights say better than a folder of the plain model: an inpainting UNet has more channels."""
    first = weights.get("conv_in.weight")
    return {} if first is None else {"in_channels": first.shape[1]}


def by_tables(path: Path, dtype: Any) -> Any:
    """The pipeline of ``path`` with configurations from the tables, and what it lacks from the Hub's cache.

    Raises ``Unsupported`` for a family whose tables do not know a whole pipeline, ``HubError`` for what is lacking and cannot be had.
    """
    single = read(path)
    taken = _taken(single)
    plan = _needed(single, taken)
    makers = {name: _of_table(single, name) for name in single.weights if name in taken}
    homes = cached_parts.homes(single.table, [*plan, *(name for name in makers if makers[name] is None)], path)
    parts = {name: _part(single, name, maker, homes.get(name), dtype) for name, maker in makers.items()}
    parts |= {name: _loaded(*words, homes[name], dtype) for name, words in plan.items()}
    parts["scheduler"] = _scheduler(single)
    facts = {name: value for name, value in single.table.facts.items() if name in taken}
    with explained(path):
        return _class(single)(**{**dict.fromkeys(_required(taken)), **facts, **parts})


def _part(single: Single, name: str, maker: Callable[[], Any] | None, home: Path | None, dtype: Any) -> Any:
    """A component of the file; ``home`` configures it where the tables do not."""
    part = single.table.components[name]
    if maker is None:
        assert home is not None, "cached_parts finds every part or raises"
        maker = _of_folder(part.library, part.cls, home, {})
    return _filled(maker, single.weights[name], dtype, single.path, part.identity)


def _class(single: Single) -> Any:
    import diffusers

    if not single.table.cls:
        raise Unsupported(
            f"hubtool does not know what a whole pipeline of {single.table.family} is made of",
            path=single.path, hint=_FOLDER,
        )  # fmt: skip
    return getattr(diffusers, single.cls)


def _taken(single: Single) -> Mapping[str, inspect.Parameter]:
    """What the class of the pipeline is made of. Raises ``Unsupported`` where the tables cannot name a part that it must have."""
    cls = _class(single)
    taken = {name: one for name, one in inspect.signature(cls.__init__).parameters.items() if name != "self"}
    known = {*single.table.components, *(name for name, words in single.table.others.items() if words), "scheduler"}
    known |= {*cls._optional_components, *single.table.facts}
    unknown = [name for name in _required(taken) if name not in known]
    if unknown:
        raise Unsupported(
            f"a single file of {single.table.family} has no {', '.join(unknown)}", path=single.path, hint=_FOLDER
        )
    return taken


def _required(taken: Mapping[str, inspect.Parameter]) -> list[str]:
    return [name for name, one in taken.items() if one.default is one.empty]


def _needed(single: Single, taken: Mapping[str, inspect.Parameter]) -> dict[str, tuple[str, str]]:
    """Part -> library and class, of everything that the pipeline has and the file has not."""
    index = configs.model_index(single.table, {name: {} for name in single.table.components})
    words = {name: value for name, value in index.items() if isinstance(value, list) and None not in value}
    spare = {name for name, part in single.table.components.items() if part.optional}
    if single.table.family == "sd3" and "text_encoder" in single.weights and "text_encoder_3" not in single.weights:
        spare |= {*_T5_OF_SD3}  # published with CLIP's encoders alone, it is meant to work without T5
    absent = {"scheduler", *single.weights, *spare}
    return {name: (value[0], value[1]) for name, value in words.items() if name in taken and name not in absent}


def _of_table(single: Single, name: str) -> Callable[[], Any] | None:
    """What makes an empty model of a component; None where only a published configuration says how."""
    part = single.table.components[name]
    config = configs.component_config(part, single.weights[name])
    if not config:
        return None
    config |= single.table.adjusted(single.source.flags, name)
    kind = _kind(part.library, part.cls, single.path)
    if part.library == "diffusers":
        return lambda: kind.from_config(config)
    return lambda: kind(kind.config_class.from_dict(config))


def _of_folder(library: str, cls: str, folder: Path, told: Mapping[str, Any]) -> Callable[[], Any]:
    """The same after the configuration of a folder, corrected by what the weights have told."""
    kind = _kind(library, cls, folder)
    if library != "diffusers":
        return lambda: kind(kind.config_class.from_pretrained(str(folder)))
    return lambda: kind.from_config({**kind.load_config(str(folder)), **told})


def _kind(library: str, cls: str, path: Path) -> Any:
    import diffusers
    import transformers

    home: Any = {"diffusers": diffusers, "transformers": transformers}.get(library)
    kind = getattr(home, cls, None)
    if kind is None:
        raise Unsupported(f"{library} has no class {cls}", path=path)
    return kind


def _scheduler(single: Single) -> Any:
    denoiser = next((own for name, own in single.weights.items() if name in DENOISERS), {})
    config = configs.scheduler_config(single.table, denoiser)
    config |= single.table.adjusted(single.source.flags, "scheduler")
    with explained(single.path):
        return _kind("diffusers", single.table.scheduler, single.path).from_config(config)


def _loaded(library: str, cls: str, folder: Path, dtype: Any) -> Any:
    """A part from a folder of its own, with its weights if it has any."""
    kind = _kind(library, cls, folder)
    words = {} if "Tokenizer" in cls else {"torch_dtype" if library == "diffusers" else "dtype": dtype}
    with explained(folder):
        return kind.from_pretrained(str(folder), **words)


def _filled(make: Callable[[], Any], weights: Weights, dtype: Any, path: Path, identity: Sequence[str]) -> Any:
    """A model with these weights, in ``dtype``. Memory for the weights is taken once; those of ``identity`` may be absent."""
    import torch
    from accelerate import init_empty_weights

    with explained(path), init_empty_weights(include_buffers=False):
        model = make()
    state = {key: _cast(compute(tensor), dtype) for key, tensor in weights.items()}
    absent = {key: torch.eye(*model.get_parameter(key).shape, dtype=dtype) for key in identity if key not in state}
    _fill(model, {**state, **absent}, path)
    return model.eval()


def _cast(tensor: Any, dtype: Any) -> Any:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _fill(model: Any, state: Mapping[str, Any], path: Path) -> None:
    """Give ``model`` its weights; every tensor must have a place, every parameter a tensor."""
    flat = not any(name.startswith("text_model.") for name in model.state_dict())
    own = {key.removeprefix("text_model.") if flat else key: value for key, value in state.items()}
    try:
        unused = model.load_state_dict(own, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:
        raise LoadMismatch(f"the weights do not fit this configuration: {error}", path=path) from error
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    wrong = [
        *(f"no place for {key}" for key in unused if not key.endswith(_DERIVED)),
        *(f"no {key}" for key in missing),
    ]
    if wrong:
        raise LoadMismatch(f"the weights do not fit this configuration: {', '.join(wrong[:_SHOWN])}", path=path)
