"""What a file is, as far as programs that load adapters stumble over it: the words that ``schemas/hosts.toml`` tests. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from hubtool.adapters.ir import Adapter, ModuleKey, Patch
from hubtool.adapters.low_rank import LowRank
from hubtool.layouts import peft_config, vocabulary
from hubtool.layouts.emission import Emission
from hubtool.layouts.parse import Parsed

_SPLIT_QKV = re.compile(r"split_qkv\W{1,8}true", re.IGNORECASE)
_BLOCK = re.compile(r"[._](?:\w+_)?blocks[._](\d+)[._]")


@dataclass(frozen=True, slots=True)
class Subject:
    """An adapter as a host meets it: its keys, its modules and its metadata. ``single``: one file, no configuration beside it."""

    keys: tuple[str, ...]
    patches: Mapping[ModuleKey, Patch]
    families: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    single: bool = True
    _known: dict[str, bool] = field(default_factory=dict, compare=False, repr=False)

    def is_(self, fact: str) -> bool:
        """Whether the fact of that name holds. Each is looked at once."""
        if fact not in self._known:
            self._known[fact] = FACTS[fact](self)
        return self._known[fact]

    def has_key(self, expression: str) -> bool:
        """Whether some key fits ``expression``, which is one of our own tables'."""
        if expression not in self._known:
            search = re.compile(expression).search
            self._known[expression] = any(search(key) for key in self.keys)
        return self._known[expression]

    @property
    def algorithms(self) -> frozenset[str]:
        return frozenset(map(algorithm, self.patches.values()))


def of_parsed(parsed: Parsed, *, single: bool = True) -> Subject:
    """The subject that a parsed file is."""
    adapter = parsed.adapter
    families = (adapter.family,) if adapter.family else parsed.candidates
    keys = (*parsed.keys.values(), *adapter.extras)
    return Subject(tuple(keys), adapter.patches, tuple(families), adapter.metadata, single)


def of_emission(adapter: Adapter, emission: Emission, families: tuple[str, ...]) -> Subject:
    """The subject that a conversion would write. What it says about scales follows the layout: an alpha folded away is gone."""
    patches: Mapping[ModuleKey, Patch] = emission.patches or adapter.patches
    metadata = {**adapter.metadata, **emission.metadata}
    return Subject(tuple(emission.tensors), patches, families, metadata, emission.container != "peft-folder")


def algorithm(patch: Patch) -> str:
    """The algorithm as hosts tell them apart: a Tucker core is an algorithm of its own."""
    return "tucker" if isinstance(patch, LowRank) and patch.mid is not None else patch.algorithm


def _alphas(subject: Subject) -> list[float | None]:
    return [patch.alpha_value for patch in subject.patches.values() if patch.rank]


def _mixed_alphas(subject: Subject) -> bool:
    return len({alpha for alpha in _alphas(subject) if alpha is not None}) > 1


def _missing_alphas(subject: Subject) -> bool:
    absent = [alpha is None for alpha in _alphas(subject)]
    return any(absent) and not all(absent)


def _scaled(subject: Subject) -> bool:
    """Whether any module's scale is other than 1."""
    return any(patch.scale != 1.0 for patch in subject.patches.values())


def _config_scales(subject: Subject) -> bool:
    return _scaled(subject) and not subject.has_key(r"\.alpha$")


def _dora(subject: Subject) -> bool:
    return any(patch.dora_scale is not None for patch in subject.patches.values())


def _dora_axis(axis: str) -> Callable[[Subject], bool]:
    return lambda subject: any(getattr(patch, "dora_axis", None) == axis for patch in subject.patches.values())


def _dora_flat(subject: Subject) -> bool:
    scales = (patch.dora_scale for patch in subject.patches.values())
    return any(scale is not None and len(scale.shape) == 1 for scale in scales)


def _rank_stabilised(subject: Subject) -> bool:
    return any(isinstance(patch, LowRank) and patch.rank_stabilised for patch in subject.patches.values())


def _projections(subject: Subject) -> dict[str, set[str]]:
    """Text encoder -> the last words of its modules."""
    found: dict[str, set[str]] = {}
    for component, path in subject.patches:
        if component.startswith("text_encoder"):
            found.setdefault(component, set()).add(path.rpartition(".")[2])
    return found


_ATTENTION, _MLP = {"q_proj", "k_proj", "v_proj"}, {"fc1", "fc2"}


def _text_encoder_qv_only(subject: Subject) -> bool:
    return any(bool(names) and names <= _ATTENTION for names in _projections(subject).values())


def _text_encoder_without_out(subject: Subject) -> bool:
    encoders = _projections(subject).values()
    return any(names & _ATTENTION and names & _MLP and "out_proj" not in names for names in encoders)


def _split_qkv(subject: Subject) -> bool:
    return bool(_SPLIT_QKV.search(subject.metadata.get("ss_network_args", "")[:65536]))


def _block_gaps(subject: Subject) -> bool:
    """Whether the blocks that are touched leave one out below the highest."""
    paths = ("." + path for component, path in subject.patches if not component.startswith("text_encoder"))
    blocks = {int(found[1]) for path in paths for found in [_BLOCK.search(path)] if found}
    return bool(blocks) and len(blocks) != max(blocks) + 1


def _stale_config(subject: Subject) -> bool:
    """Whether ``lora_adapter_metadata`` speaks of other ranks than the tensors have."""
    document = _document(subject.metadata.get(peft_config.KEY))
    return any(
        patch.rank != rank
        for (component, path), patch in subject.patches.items()
        for rank in [_claimed_rank(document, component, path)]
        if rank is not None and patch.rank
    )


def _document(text: str | None) -> Mapping[str, Any]:
    try:
        document = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _claimed_rank(document: Mapping[str, Any], component: str, path: str) -> int | None:
    """The rank a configuration gives a module: by the longest pattern that ends its path, as PEFT does for literal keys."""
    pattern, rank = document.get(f"{component}.rank_pattern"), document.get(f"{component}.r")
    listed = pattern if isinstance(pattern, dict) else {}
    plain = {part.lstrip("^").replace("\\", ""): value for key, value in listed.items() for part in str(key).split("|")}
    parts = path.split(".")
    ends = (plain.get(".".join(parts[at:])) for at in range(len(parts)))
    found = next((value for value in ends if value is not None), rank)
    return found if isinstance(found, int) else None


def _early_lokr(subject: Subject) -> bool:
    """LoKr convolutions of March 2023: the first factor's columns split the flattened kernel, not the input channels."""
    return any(
        patch.algorithm == "lokr" and _splits_the_kernel(patch, shape)
        for (component, path), patch in subject.patches.items()
        for shape in [_shape(subject.families, component, path)]
        if shape is not None and len(shape) == 4
    )


def _splits_the_kernel(patch: Patch, shape: tuple[int, ...]) -> bool:
    roles = dict(patch.roles())
    first = roles.get("lokr_w1", roles.get("lokr_w1_b"))
    return first is not None and len(first.shape) == 2 and shape[1] % first.shape[1] != 0


def _shape(families: tuple[str, ...], component: str, path: str) -> tuple[int, ...] | None:
    return vocabulary.weight_shape(families[0], component, path) if families else None


FACTS: Mapping[str, Callable[[Subject], bool]] = MappingProxyType(
    {
        "mixed-alphas": _mixed_alphas,
        "missing-alphas": _missing_alphas,
        "no-alphas": lambda subject: all(alpha is None for alpha in _alphas(subject)),
        "scaled": _scaled,
        "config-scales": _config_scales,
        "rank-stabilised": _rank_stabilised,
        "dora": _dora,
        "dora-scale": lambda subject: subject.has_key("dora_scale"),
        "dora-per-input": _dora_axis("in"),
        "dora-per-output": _dora_axis("out"),
        "dora-flat": _dora_flat,
        "text-encoder-qv-only": _text_encoder_qv_only,
        "text-encoder-without-out": _text_encoder_without_out,
        "split-qkv": _split_qkv,
        "block-gaps": _block_gaps,
        "stale-config": _stale_config,
        "early-lokr": _early_lokr,
        "single-file": lambda subject: subject.single,
    }
)
