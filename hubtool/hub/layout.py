"""Where the files of a publication lie in their repository, so that libraries load it without arguments (spec/hub.md 2).

One canonical file at the root; the same adapter in other layouts in a folder named after its syntax, epochs in ``epochs/``, pictures in
``images/``, anything else in ``variants/``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection

INDEX = "hubtool.json"
CARD = "README.md"
LORA = "pytorch_lora_weights.safetensors"
EMBEDDING = "learned_embeds.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
# kohya NAME-000010, ai-toolkit NAME_000000500, kohya NAME-step00001000, OneTrainer NAME-5-0-500
_EPOCH = re.compile(r"(?:-\d{6}|_\d{9}|-step\d{6,}|[-_]e(?:poch)?[-_]?\d{1,6}|-\d+-\d+-\d+)$", re.IGNORECASE)
_UNSAFE = re.compile(r"[^\w.+@ ()\[\]-]+")
# diffusers leaves files with these words in their names out when it looks for an adapter
SHADOWED = ("scheduler", "optimizer", "checkpoint")


def stem_of_run(stem: str) -> str:
    """The name that all epochs of one training share."""
    return _EPOCH.sub("", stem)


def is_epoch(stem: str) -> bool:
    """Whether a file name ends with the number of an epoch or a step."""
    return _EPOCH.search(stem) is not None


def safe_name(name: str) -> str:
    """A file name that is safe in a repository, on every disk and in a URL."""
    text = unicodedata.normalize("NFC", name)
    cleaned = _UNSAFE.sub("_", text).strip(" .") or "file"
    return cleaned if not any(word in cleaned.lower() for word in SHADOWED) else _unshadowed(cleaned)


def _unshadowed(name: str) -> str:
    for word in SHADOWED:
        name = re.sub(word, word[:4], name, flags=re.IGNORECASE)
    return name


def place(name: str, *, main_stem: str, layout: str | None, same_content: bool) -> str:
    """The path of a file beside the canonical one. ``same_content``: it is the same adapter in another layout."""
    stem = name.rpartition(".")[0] or name
    if same_content and layout:
        return f"{layout.partition('/')[0]}/{safe_name(name)}"
    if is_epoch(stem) or stem_of_run(stem) == stem_of_run(main_stem):
        return f"epochs/{safe_name(name)}"
    return f"variants/{safe_name(name)}"


def unique(path: str, taken: Collection[str]) -> str:
    """``path``, or the first ``path-2``, ``path-3`` ... that is free."""
    stem, dot, suffix = path.rpartition(".")
    stem, dot, suffix = (stem, dot, suffix) if stem else (path, "", "")
    candidates = (path if n == 1 else f"{stem}-{n}{dot}{suffix}" for n in range(1, len(taken) + 2))
    return next(candidate for candidate in candidates if candidate not in taken)
