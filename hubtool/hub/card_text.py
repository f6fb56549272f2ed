"""Facts -> a model card: the front matter that the Hub reads, and the blocks that people read (spec/hub.md 1.2)."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

from hubtool.hub.cards import Card, marked
from hubtool.hub.facts import Facts, Listed
from hubtool.hub.snippets import snippet

_LIBRARY = {"peft": "peft", "none": None}
_KIND_TAGS = {
    "embedding": ("textual_inversion", "diffusers"),
    "merge": ("merge", "checkpoint", "diffusers"),
    "finetune": ("checkpoint", "diffusers"),
}
_ALGORITHM_TAGS = {"loha": "lycoris", "lokr": "lycoris", "locon": "lycoris", "oft": "lycoris", "glora": "lycoris"}
_PLACES = {
    "adapter": "In ComfyUI put a file into `models/loras`, in A1111 into `models/Lora`.",
    "embedding": "In ComfyUI and A1111 put a file into `embeddings`; its name is then the word to write.",
}
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~-])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]+")


def card(facts: Facts) -> Card:
    """The card that hubtool writes for these facts."""
    return Card(front(facts), body(facts))


def front(facts: Facts) -> dict[str, Any]:
    """The front matter, in the order of spec/hub.md 1.2."""
    bases = list(facts.base_models)
    rows = {
        "base_model": (bases[0] if len(bases) == 1 else bases) or None,
        "base_model_relation": facts.relation if bases else None,
        "library_name": _LIBRARY.get(facts.loads, "diffusers"),
        "pipeline_tag": facts.task,
        **(facts.licence.front() if facts.licence else {"license": "unknown"}),
        "instance_prompt": ", ".join(map(plain, facts.words)) or None,
        "tags": list(tags(facts)),
        "widget": [_example(picture.path, picture.prompt, picture.negative) for picture in facts.pictures] or None,
    }
    return {key: value for key, value in rows.items() if value is not None}


def _example(path: str, prompt: str, negative: str) -> dict[str, Any]:
    row: dict[str, Any] = {"text": plain(prompt) or "-", "output": {"url": path}}
    return {**row, "parameters": {"negative_prompt": plain(negative)}} if negative else row


def tags(facts: Facts) -> tuple[str, ...]:
    """What finds this publication, each once."""
    own = _KIND_TAGS.get(facts.card) or (_adapter_tags(facts) if facts.card == "adapter" else ())
    family = facts.tags if facts.loads != "peft" else ()
    last = ("not-for-all-audiences",) if facts.nsfw else ()
    task = (facts.task,) if facts.task else ()
    return tuple(dict.fromkeys((*own, *task, *family, *facts.extra_tags, *last)))


def _adapter_tags(facts: Facts) -> tuple[str, ...]:
    algorithm = facts.algorithm or "lora"
    kind = ("lora", _ALGORITHM_TAGS.get(algorithm, algorithm)) if facts.loads != "none" else (algorithm,)
    return (*kind, "diffusers", "template:sd-lora") if facts.loads == "lora" else kind


def body(facts: Facts) -> str:
    """Title and blocks; a block without content is left out."""
    made = ((name, write(facts)) for name, write in BLOCKS.items())
    blocks = "\n".join(marked(name, text) for name, text in made if text)
    return f"\n# {_markdown(facts.title)}\n\n{blocks}"


def plain(text: str) -> str:
    """One line of text without characters that steer a terminal or a page."""
    return _CONTROL.sub(" ", text).strip()


def _markdown(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", html.escape(plain(text), quote=False))


def code(text: str) -> str:
    """Text shown as it is, whatever backticks and tags it holds."""
    return f"<code>{html.escape(plain(text), quote=False).replace('`', '&#96;').replace('|', '&#124;')}</code>"


def _gallery(facts: Facts) -> str:
    return "<Gallery />" if facts.pictures else ""


def _words(facts: Facts) -> str:
    if not facts.words:
        return ""
    lines = "\n".join(f"- {code(word)}" for word in facts.words)
    return f"## Trigger words\n\n{lines}"


def _strength(facts: Facts) -> str:
    return "" if facts.strength is None else f"## Strength\n\nRecommended strength: **{facts.strength:g}**"


def _use(facts: Facts) -> str:
    made = snippet(facts)
    url = f"{facts.endpoint}/{facts.repo}/resolve/main"
    lines = [
        f"- [{_markdown(one.path)}]({url}/{quote(one.path)}){f' ({_markdown(one.note)})' if one.note else ''}, {one.size} bytes"
        for one in _weights(facts)
    ]
    where = "" if facts.loads == "peft" else _PLACES.get(facts.card, "")
    parts = ["## Use", f"```py\n{made.rstrip()}\n```" if made else "", "\n".join(lines), where if lines else ""]
    return "\n\n".join(part for part in parts if part)


def _weights(facts: Facts) -> Iterator[Listed]:
    for listed in facts.files:
        if listed.path.endswith(".safetensors") and facts.loads != "pipeline":
            yield listed


def _provenance(facts: Facts) -> str:
    rows = [f"| {_markdown(name)} | {code(value)} |" for name, value in facts.details.items() if value]
    main = next((listed for listed in facts.files if listed.path == facts.main), None)
    rows += [f"| SHA-256 of {code(main.path)} | {code(main.sha256)} |"] if main else []
    table = "| | |\n| --- | --- |\n" + "\n".join(rows) if rows else ""
    recipe = (
        f"\n\n<details><summary>Recipe</summary>\n\n```json\n{facts.recipe}\n```\n\n</details>" if facts.recipe else ""
    )
    return f"## Provenance\n\n{table}{recipe}" if table or recipe else ""


def _licence(facts: Facts) -> str:
    licence = facts.licence
    if licence is None:
        return ""
    name = _markdown(licence.name or licence.id)
    text = f"[{name}]({licence.link})" if licence.link else name
    bases = " and ".join(code(name) for name in facts.base_models)
    return f"## Licence\n\n{text}{f'; it follows from {bases}' if bases else ''}."


BLOCKS: Mapping[str, Callable[[Facts], str]] = {
    "gallery": _gallery,
    "words": _words,
    "strength": _strength,
    "use": _use,
    "provenance": _provenance,
    "licence": _licence,
}


def recipe_text(document: Mapping[str, Any]) -> str:
    """A recipe as text that cannot end the code block it stands in."""
    return json.dumps(document, indent=2, ensure_ascii=False, sort_keys=True).replace("`", "\\u0060")
