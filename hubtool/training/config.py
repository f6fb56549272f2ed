"""What a training run is asked to do: TOML in, frozen dataclasses out. ``schemas/train.schema.json`` says what every word means."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubtool.errors import CorruptFile, FileMissing, UsageProblem
from hubtool.ops.recipes.schema import problems, schema

# what a resumed run may be told differently: none of it changes a number that was or will be computed
FREE = frozenset({"output", "validation", "run.checkpoint_every", "run.checkpoints_kept", "run.log_every"})


@dataclass(frozen=True, slots=True)
class Output:
    folder: str = "trained"
    name: str = "adapter"
    layout: str = "diffusers"
    form: str = "folder"
    dtype: str = "float32"
    trigger: tuple[str, ...] = ()
    title: str = ""
    author: str = ""
    description: str = ""
    license: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Data:
    folder: str = ""
    captions: str = "auto"
    template: tuple[str, ...] = ()
    resolution: int = 512
    buckets: bool = True
    crop: str = "centre"
    flip: bool = False
    repeats: int = 1
    masks: bool = False
    mask_floor: float = 0.1
    caption_dropout: float = 0.0
    shuffle_tags: bool = False
    keep_tags: int = 1
    cache_latents: bool = True
    class_folder: str = ""
    class_prompt: str = ""
    class_images: int = 0


@dataclass(frozen=True, slots=True)
class AdapterPart:
    rank: int = 16
    alpha: float = 16.0
    conv_rank: int = 0
    conv_alpha: float = 1.0
    targets: str = "attention"
    only: tuple[str, ...] = ()
    dora: bool = False
    rank_stabilised: bool = False
    dropout: float = 0.0
    text_encoders: bool = False
    t5: bool = False
    full: bool = False
    start: str = ""


@dataclass(frozen=True, slots=True)
class Tokens:
    names: tuple[str, ...] = ()
    vectors: int = 1
    encoders: str = "all"
    start: str = ""
    noise: float = 0.0
    norm_decay: float = 0.0
    norm: float = 0.0
    only_steps: int = 0
    joint: bool = True


@dataclass(frozen=True, slots=True)
class Optimiser:
    name: str = "adamw"
    rate: float = 1e-4
    text_rate: float = 5e-5
    token_rate: float = 5e-4
    weight_decay: float = 0.01
    betas: tuple[float, ...] = (0.9, 0.999)
    epsilon: float = 1e-8
    clip: float = 1.0
    schedule: str = "constant"
    warmup: int = 0
    cycles: int = 1
    final: float = 0.0
    ema: float = 0.0


@dataclass(frozen=True, slots=True)
class Objective:
    prediction: str = "auto"
    snr_gamma: float = 0.0
    noise_offset: float = 0.0
    prior_weight: float = 1.0
    sampling: str = "auto"
    guidance: float = 1.0
    clip_skip: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    steps: int = 1000
    batch: int = 1
    accumulate: int = 1
    seed: int = 0
    precision: str = "auto"
    quantise: str = "none"
    device: str = "auto"
    checkpointing: bool = False
    offload: bool = False
    checkpoint_every: int = 500
    checkpoints_kept: int = 2
    log_every: int = 1


@dataclass(frozen=True, slots=True)
class Validation:
    prompts: tuple[str, ...] = ()
    negative: str = ""
    every: int = 0
    images: int = 1
    steps: int = 25
    guidance: float = 7.0
    seed: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True)
class Config:
    """A whole run. ``method``: the file of ``training/methods``. ``base``: a diffusers folder, a repository, or a single file.

    ``config_from``: a diffusers folder that a single file takes configurations and tokenizers from.
    """

    method: str = "lora"
    base: str = ""
    config_from: str = ""
    output: Output = field(default_factory=Output)
    data: Data = field(default_factory=Data)
    adapter: AdapterPart = field(default_factory=AdapterPart)
    tokens: Tokens = field(default_factory=Tokens)
    optimiser: Optimiser = field(default_factory=Optimiser)
    objective: Objective = field(default_factory=Objective)
    run: Run = field(default_factory=Run)
    validation: Validation = field(default_factory=Validation)

    def to_json(self) -> dict[str, Any]:
        """The document that ``from_mapping`` reads, every word written out."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


_SECTIONS: Mapping[str, type[Any]] = {
    "output": Output, "data": Data, "adapter": AdapterPart, "tokens": Tokens, "optimiser": Optimiser, "objective": Objective,
    "run": Run, "validation": Validation,
}  # fmt: skip


def from_mapping(document: Mapping[str, Any]) -> Config:
    """Check ``document`` against the schema and make it a ``Config``. Raises ``UsageProblem`` that lists what is wrong."""
    found = list(problems(dict(document), schema("train")))
    if found:
        raise UsageProblem("; ".join(found), hint="hubtool train --explain lists every word")
    sections = {name: cls(**_frozen(document.get(name, {}))) for name, cls in _SECTIONS.items()}
    plain = {name: document[name] for name in ("method", "base", "config_from") if name in document}
    return Config(**plain, **sections)


def read(path: str | Path) -> dict[str, Any]:
    """The document in a TOML file. Raises ``FileMissing``, ``CorruptFile``."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileMissing("there is no such configuration", path=path) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CorruptFile(f"this is no TOML: {error}", path=path) from error


def settings(pairs: Iterable[str]) -> dict[str, Any]:
    """``["run.steps=100", "data.folder=cats"]`` as a document. The right side is TOML, or else plain text. Raises ``UsageProblem``."""
    document: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UsageProblem(f"{pair!r} sets nothing", hint="--set run.steps=100")
        section, _, word = name.strip().rpartition(".")
        (document.setdefault(section, {}) if section else document)[word] = _value(text)
    return document


def merged(*documents: Mapping[str, Any]) -> dict[str, Any]:
    """Later documents win, word by word."""
    out: dict[str, Any] = {}
    for document in documents:
        for name, value in document.items():
            old = out.get(name)
            out[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, Mapping) else value
    return out


def to_toml(config: Config) -> str:
    """The configuration as TOML that ``read`` gives back."""
    document = config.to_json()
    plain = [f"{name} = {toml(value)}" for name, value in document.items() if not isinstance(value, dict)]
    for name, section in document.items():
        if isinstance(section, dict):
            plain += ["", f"[{name}]", *(f"{word} = {toml(value)}" for word, value in section.items())]
    return "\n".join(plain) + "\n"


def binding(config: Config) -> dict[str, Any]:
    """The words that must not change between an interruption and its resumption."""
    document = config.to_json()
    flat = {name: value for name, value in document.items() if not isinstance(value, dict)}
    for name, section in document.items():
        if isinstance(section, dict) and name not in FREE:
            flat |= {f"{name}.{word}": value for word, value in section.items() if f"{name}.{word}" not in FREE}
    return flat


def digest(config: Config) -> str:
    """Twelve hex digits that stand for everything that binds."""
    return hashlib.sha256(json.dumps(binding(config), sort_keys=True).encode()).hexdigest()[:12]


def _frozen(section: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def toml(value: Any) -> str:
    """One value as TOML writes it."""
    if isinstance(value, list):
        return f"[{', '.join(toml(one) for one in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
