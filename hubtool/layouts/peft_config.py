"""PEFT's LoRA configuration: read from ``adapter_config.json`` or diffusers' ``lora_adapter_metadata``, and written for both.

Scales live nowhere else in these layouts. Pattern keys are regular expressions in PEFT (``(.*\\.)?KEY$``); only literal ones are
honoured here (an untrusted expression is not run), others are reported. Source: peft.utils.other.get_pattern_key, diffusers #11324.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from hubtool.adapters.low_rank import LowRank
from hubtool.types import Finding

KEY = "lora_adapter_metadata"
_LITERAL = re.compile(r"\^?[\w.\-\\]+")
_OPTIONAL_HEAD = "text_model."
_MANY_KEYS = 32
_NONE: Mapping[str, float] = MappingProxyType({})


class PeftConfig(NamedTuple):
    """What one component's configuration says about scales. ``alpha`` None: the file says nothing, alpha = rank.

    ``neumann_terms``: the length of the series that PEFT's OFT puts in place of the inverse; None for the exact one.
    """

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = _NONE
    rank_stabilised: bool = False
    neumann_terms: int | None = None
    findings: tuple[Finding, ...] = ()

    def alpha_of(self, path: str) -> float | None:
        """The module's alpha: the longest pattern that ends its path (``^``: that is all of it), else the default."""
        parts = path.split(".")
        for ending in ("^" + path, *(".".join(parts[i:]) for i in range(len(parts)))):
            value = self.alpha_pattern.get(ending)
            if value is not None:
                return value
        return self.alpha


def of_component(metadata: Mapping[str, str], component: str) -> PeftConfig:
    """The configuration of one component in a file's ``lora_adapter_metadata``; empty when there is none or it cannot be read."""
    document = _document(metadata.get(KEY))
    head = component + "."
    return from_dict({key[len(head) :]: value for key, value in document.items() if key.startswith(head)})


def _document(text: str | None) -> Mapping[str, Any]:
    if text is None:
        return {}
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def from_dict(config: Mapping[str, Any]) -> PeftConfig:
    """Read ``adapter_config.json`` or one component's part of the metadata. Values of the wrong type count as absent."""
    alpha = _number(config.get("lora_alpha", config.get("alpha")))  # the second: PEFT's LoHa and LoKr
    pattern = config.get("alpha_pattern")
    pattern = pattern if isinstance(pattern, dict) else {}
    read = [(key, value) for keys, value in pattern.items() for key in keys.split("|")]
    literal = {key: value for key, value in read if _LITERAL.fullmatch(key) and _number(value) is not None}
    odd = [key for key, _ in read if key not in literal]
    findings = [
        Finding("alpha-pattern", "error", f"alpha_pattern key {key!r} is no literal module name") for key in odd[:3]
    ]
    plain = {key.replace("\\", ""): float(value) for key, value in literal.items()}
    return PeftConfig(alpha, plain, config.get("use_rslora") is True, _terms(config), tuple(findings))


def _terms(config: Mapping[str, Any]) -> int | None:
    """PEFT's defaults: the series, five terms long."""
    terms = config.get("num_cayley_neumann_terms", 5)
    return terms if config.get("use_cayley_neumann", True) and isinstance(terms, int) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def build(patches: Mapping[str, LowRank], *, text_encoder: bool) -> dict[str, Any]:
    """The LoraConfig fields that give every module its own rank and scale. ``patches``: canonical path -> factors.

    Text-encoder names lose ``text_model.``, so that the patterns match both generations of transformers.
    """
    named = {_short(path) if text_encoder else path: patch for path, patch in patches.items()}
    rank = _commonest(patch.rank for patch in named.values())
    alphas = {path: _plain(patch) for path, patch in named.items()}
    alpha = _commonest(alphas.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: patch.rank for path, patch in named.items() if patch.rank != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        "target_modules": sorted(named),
        "use_dora": any(patch.dora_scale is not None for patch in named.values()),
        "use_rslora": any(patch.rank_stabilised for patch in named.values()),
        "lora_bias": any(patch.bias is not None for patch in named.values()),
    }


def _short(path: str) -> str:
    return path.removeprefix(_OPTIONAL_HEAD)


def _plain(patch: LowRank) -> float:
    alpha = patch.rank if patch.alpha_value is None else patch.alpha_value
    return int(alpha) if float(alpha).is_integer() and abs(alpha) < 2**53 else alpha


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def anchored(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with ``^`` before pattern keys that would also match a longer module name, and many keys of one value joined by ``|``.

    PEFT compiles every key for every module; beyond its regex cache (512) a file of hundreds of keys takes seconds to load.
    """
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if config[key]]
    shadowed = _shadowed(config["target_modules"]) if patterns else frozenset()
    for key in patterns:
        names_of: dict[Any, list[str]] = {}
        for path, value in config[key].items():
            names_of.setdefault(value, []).append(f"^{path}" if path in shadowed else path)
        joined = len(config[key]) > _MANY_KEYS
        config[key] = {
            name: value for value, paths in names_of.items() for name in (["|".join(paths)] if joined else paths)
        }
    return config


def _shadowed(names: Iterable[str]) -> frozenset[str]:
    """Names that are the end of a longer one, which their pattern would match too."""
    listed = frozenset(names)
    return listed & {name[at + 1 :] for name in listed for at, letter in enumerate(name) if letter == "."}
