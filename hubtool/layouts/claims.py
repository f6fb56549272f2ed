"""What metadata says about a file: kept apart from what the tensors say, and never trusted. Hostile text is found by ``formats``.

Sources: kohya ``ss_*``, ModelSpec ``modelspec.*``, OneTrainer ``ot_*``, ai-toolkit ``software`` / ``training_info``, diffusers
``lora_adapter_metadata``, PEFT ``adapter_config.json``, and the scalar leaves of a pickle (spec/artefacts.md I.2-I.4).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from hubtool import resources
from hubtool.formats.base import TensorFile
from hubtool.types import Finding

_JSON_LIMIT = 16 << 20  # a tag table of a large data set; beyond that it is not worth the time
_MOST_WORDS = 64


@dataclass(frozen=True, slots=True)
class Claims:
    """``values`` go to ``Identity.claims``; ``family`` is the claimed family; ``trigger_words`` in order of trust."""

    values: dict[str, Any] = field(default_factory=dict)
    family: str | None = None
    trigger_words: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


# metadata key -> name of the claim; a claim's first source wins
_TEXT_CLAIMS = (
    ("modelspec.title", "title"), ("modelspec.author", "author"), ("modelspec.description", "description"),
    ("modelspec.license", "license"), ("modelspec.date", "date"), ("modelspec.architecture", "architecture"),
    ("modelspec.usage_hint", "usage_hint"), ("modelspec.resolution", "resolution"), ("modelspec.tags", "tags"),
    ("modelspec.prediction_type", "prediction_type"), ("modelspec.merged_from", "merged_from"),
    ("modelspec.hash_sha256", "hash_sha256"), ("modelspec.is_negative_embedding", "is_negative_embedding"),
    ("modelspec.implementation", "implementation"), ("modelspec.encoder_layer", "clip_skip"),
    ("ss_output_name", "title"), ("ss_base_model_version", "base_model_version"), ("ss_sd_model_name", "base_model"),
    ("ss_sd_model_hash", "base_model_autov1"), ("ss_new_sd_model_hash", "base_model_sha256"),
    ("ss_network_module", "network_module"), ("ss_resolution", "resolution"), ("ss_clip_skip", "clip_skip"),
    ("ss_training_comment", "comment"), ("ss_v2", "v2"), ("sshs_model_hash", "sshs_model_hash"),
    ("sshs_legacy_hash", "sshs_legacy_hash"), ("ssmd_display_name", "title"), ("ssmd_author", "author"),
    ("ssmd_description", "description"), ("ssmd_tags", "tags"), ("ot_branch", "ot_branch"), ("ot_revision", "ot_revision"),
)  # fmt: skip
_NUMBER_CLAIMS = (
    ("ss_network_dim", "network_dim"), ("ss_network_alpha", "network_alpha"), ("ss_epoch", "epoch"), ("ss_steps", "steps"),
    ("ss_num_train_images", "images"),
)  # fmt: skip
_JSON_CLAIMS = (
    ("ss_network_args", "network_args"), ("software", "software"), ("training_info", "training_info"),
    ("lora_adapter_metadata", "lora_adapter_metadata"), ("sd_merge_recipe", "merge_recipe"), ("sd_merge_models", "merge_models"),
)  # fmt: skip
_DOCUMENTS = (
    "ss_tag_frequency",
    "ss_bucket_info",
    "ss_dataset_dirs",
    "ss_datasets",
    "ot_config",
    *(key for key, _ in _JSON_CLAIMS),
)
# fields of a pickle's top level (A1111 embeddings and hypernetworks)
_PICKLE_CLAIMS = (
    ("name", "title"), ("step", "steps"), ("sd_checkpoint", "base_model_autov1"), ("sd_checkpoint_name", "base_model"),
    ("global_step", "steps"), ("epoch", "epoch"),
)  # fmt: skip


def read_claims(file: TensorFile) -> Claims:
    """Collect what the file's metadata and configs claim. Malformed values become findings, never errors."""
    if not file.metadata and not file.config and file.structure is None:
        return Claims()
    documents, broken = _documents(file.metadata)
    values = {**_pickle_values(file), **_metadata_values(file.metadata, documents), **_peft_values(file.config)}
    family = _family(file.metadata, values, documents.get("ot_config"))
    words = _trigger_words(file.metadata.get("modelspec.trigger_phrase", ""), documents)
    return Claims(values, family, words, tuple(broken))


def _documents(metadata: Mapping[str, str]) -> tuple[dict[str, Any], list[Finding]]:
    """The JSON values among the metadata, each parsed once; ``None`` is sd-scripts' word for nothing."""
    documents, broken = {}, []
    for key in _DOCUMENTS:
        text = metadata.get(key)
        if not text or text == "None" or len(text) > _JSON_LIMIT:
            continue
        try:
            documents[key] = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            broken.append(Finding("metadata-bad-json", "warning", f"metadata {key} is not valid JSON"))
    return documents, broken


def _refuse(constant: str) -> None:
    """A bare NaN or Infinity is Python's JSON, nobody else's."""
    raise ValueError(constant)


def number(text: str) -> float | int | None:
    """A plain number of at most 18 digits; None for anything else (``nan``, 5000 digits, prose)."""
    if len(text) > 24:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    if not abs(value) <= 1e18:  # also catches nan
        return None
    return int(value) if value.is_integer() else value


def _metadata_values(metadata: Mapping[str, str], documents: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, name in _TEXT_CLAIMS:
        text = metadata.get(key)
        if text and text != "None":
            values.setdefault(name, text)
    for key, name in _NUMBER_CLAIMS:
        found = number(metadata.get(key, ""))
        if found is not None:
            values[name] = found
    return {**values, **{name: documents[key] for key, name in _JSON_CLAIMS if key in documents}}


def _pickle_values(file: TensorFile) -> dict[str, Any]:
    if not isinstance(file.structure, Mapping):
        return {}
    found = ((name, file.structure.get(key)) for key, name in _PICKLE_CLAIMS)
    return {name: value for name, value in found if isinstance(value, str | int | float)}


def _peft_values(config: Mapping[str, Any]) -> dict[str, Any]:
    adapter = config.get("adapter_config.json")
    if not isinstance(adapter, Mapping):
        return {}
    fields = (
        ("base_model_name_or_path", "base_model"),
        ("peft_type", "peft_type"),
        ("r", "network_dim"),
        ("lora_alpha", "network_alpha"),
    )
    return {name: adapter[key] for key, name in fields if isinstance(adapter.get(key), str | int | float)}


@cache
def _tables() -> dict[str, Any]:
    return resources.table("claims.toml")


def _family(metadata: Mapping[str, str], values: Mapping[str, Any], onetrainer: Any) -> str | None:
    """First source that names a known family: ModelSpec, kohya, OneTrainer, then the name of the base repository."""
    architecture, kohya = metadata.get("modelspec.architecture"), metadata.get("ss_base_model_version")
    found = _by_prefix("modelspec", architecture) or _by_prefix("kohya", kohya)
    if found is None and metadata.get("ss_v2") == "True":
        found = "sd2"
    base = onetrainer.get("base_model_name") if isinstance(onetrainer, Mapping) else None
    return found or _by_repository(values.get("base_model")) or _by_repository(base)


def _by_prefix(table: str, value: str | None) -> str | None:
    lowered = (value or "").lower()
    return (
        next((family for prefix, family in _tables()[table] if lowered.startswith(prefix)), None) if lowered else None
    )


def _by_repository(name: Any) -> str | None:
    """Only names that look like ``owner/repo``: a file name proves nothing."""
    if not isinstance(name, str) or name.count("/") != 1:
        return None
    lowered = name.lower()
    return next((family for part, family in _tables()["repository"] if part in lowered), None)


def related(claimed: str, found: str) -> bool:
    """Whether a claim of ``claimed`` is compatible with ``found``: the same family, or one trained from the other."""
    return claimed == found or found in _tables()["siblings"].get(claimed, ())


def _trigger_words(phrase: str, documents: Mapping[str, Any]) -> tuple[str, ...]:
    """ModelSpec's phrase, then the tags that every training image carries."""
    words = [word.strip() for word in phrase.split(",")]
    words += _common_tags(documents.get("ss_tag_frequency"), documents.get("ss_dataset_dirs"))
    return tuple(dict.fromkeys(word for word in words if word))[:_MOST_WORDS]


def _common_tags(frequency: Any, folders: Any) -> list[str]:
    """Tags whose count reaches the number of images of their folder (``ss_dataset_dirs``)."""
    if not isinstance(frequency, Mapping) or not isinstance(folders, Mapping):
        return []
    found: list[str] = []
    for folder, counts in frequency.items():
        about = folders.get(folder)
        images = about.get("img_count") if isinstance(about, Mapping) else None
        if isinstance(counts, Mapping) and isinstance(images, int) and images > 0:
            found += [tag.strip() for tag, count in counts.items() if isinstance(count, int) and count >= images]
    return found
