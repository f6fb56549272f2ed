"""Everything the Hub refuses, found before a byte is sent (spec/hub.md 0.2, 1.1): names, paths, and the front matter of a card."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from hubtool.errors import UsageProblem
from hubtool.hub.licences import licence_ids
from hubtool.hub.refs import is_safe, parse_ref
from hubtool.types import Finding

RELATIONS = ("adapter", "finetune", "merge", "quantized")
_LISTS = ("tags", "datasets", "language", "metrics", "base_model", "license")
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILE_ENDS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".yaml", ".json")
_CODE = re.compile(r"^```(?:py|python)[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
MAX_REGULAR = 10 << 20  # bytes of a file that is not in LFS


def check_repo(text: str) -> str:
    """The id of the repository that ``text`` names. Raises ``UsageProblem`` for what the Hub takes for no repository."""
    ref = parse_ref(text)
    if ref.revision or ref.path:
        raise UsageProblem(
            f"{text} is more than a repository", hint="publish to OWNER/NAME; name a branch with --revision"
        )
    return ref.repo


def is_model_id(name: str, *, owned: bool = True) -> bool:
    """Whether ``name`` looks like a model of the Hub and not like a path, a URL or a file. ``owned``: a namespace is needed."""
    if not _ID.fullmatch(name) or name.startswith(".") or name.lower().endswith(_FILE_ENDS):
        return False
    return "/" in name or not owned


def check_front(front: Mapping[str, Any]) -> list[Finding]:
    """What the Hub would refuse in a front matter (errors), and what makes a model hard to find or its licence unclear (warnings)."""
    return [*_lists(front), *_licence(front), *_base(front), *_strings(front), *_widget(front)]


def _error(message: str) -> Finding:
    return Finding("card-refused", "error", message)


def _warning(message: str) -> Finding:
    return Finding("card-incomplete", "warning", message)


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _lists(front: Mapping[str, Any]) -> Iterator[Finding]:
    for key in _LISTS:
        for item in _items(front.get(key)):
            if not isinstance(item, str):
                yield _error(f"{key} must hold text only; {item!r} is {type(item).__name__} to YAML: put it in quotes")


def _licence(front: Mapping[str, Any]) -> Iterator[Finding]:
    given = [item for item in _items(front.get("license")) if isinstance(item, str)]
    for item in given:
        if item not in licence_ids():
            yield _error(f"license {item!r} is not on the Hub's list; use other with license_name and license_link")
    if not given or "unknown" in given:
        yield _warning("no licence is named: nobody may use this; give --license")
    if "other" in given:
        missing = [key for key in ("license_name", "license_link") if not front.get(key)]
        if missing:
            yield _warning(f"license other needs {' and '.join(missing)}")


def _base(front: Mapping[str, Any]) -> Iterator[Finding]:
    bases = [item for item in _items(front.get("base_model")) if isinstance(item, str)]
    for item in bases:
        if not is_model_id(item, owned=False):
            yield _error(f"base_model {item!r} is not an id of the Hub (a path or a URL is refused); give --base-model")
    if not bases:
        yield _warning("no base_model: nobody who looks for adapters of a model finds this one; give --base-model")
    relation = front.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        yield _error(f"base_model_relation {relation!r} is none of {', '.join(RELATIONS)}")
    successor = front.get("new_version")
    if successor is not None and not (isinstance(successor, str) and is_model_id(successor)):
        yield _error(f"new_version {successor!r} is not an id of the Hub")


def _strings(front: Mapping[str, Any]) -> Iterator[Finding]:
    for key in ("library_name", "pipeline_tag", "instance_prompt", "license_name", "license_link", "thumbnail"):
        if key in front and not isinstance(front[key], str):
            yield _error(f"{key} must be text, not {type(front[key]).__name__}")


def _widget(front: Mapping[str, Any]) -> Iterator[Finding]:
    for row in _items(front.get("widget")):
        if not isinstance(row, Mapping) or not isinstance(row.get("text", ""), str):
            yield _error("an entry of widget is not {text, output: {url}}")


def examples(front: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The pictures that a card's gallery shows: (path in the repository or URL, prompt, negative prompt)."""
    rows = [row for row in _items(front.get("widget")) if isinstance(row, Mapping)]
    found = []
    for row in rows:
        output, parameters = row.get("output"), row.get("parameters")
        url = output.get("url") if isinstance(output, Mapping) else None
        negative = parameters.get("negative_prompt", "") if isinstance(parameters, Mapping) else ""
        if isinstance(url, str):
            found.append((url, str(row.get("text", "")), str(negative)))
    return found


def check_files(front: Mapping[str, Any], files: Collection[str]) -> list[Finding]:
    """Whether the pictures and the licence text that a card names are files of the repository."""
    link = front.get("license_link")
    named = [*(url for url, _, _ in examples(front)), *([link] if isinstance(link, str) else [])]
    lost = [name for name in named if "://" not in name and name not in files]
    return [_error(f"the card names {name!r}, which is not in the repository") for name in lost]


def check_body(body: str, files: Collection[str] | None = None) -> list[Finding]:
    """Whether the Python in a card can be read, and whether the weights that it names are files of the repository."""
    found = []
    for number, match in enumerate(_CODE.finditer(body), start=1):
        try:
            tree = ast.parse(match[1])
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            found.append(Finding("card-snippet", "warning", f"snippet {number} of the card is no Python"))
            continue
        texts = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        named = sorted(text for text in texts if text.endswith(".safetensors") and "://" not in text)
        lost = [name for name in named if files is not None and name not in files]
        found += [
            Finding("card-snippet", "warning", f"a snippet of the card reads {name!r}, which is not in the repository")
            for name in lost
        ]
    return found


def check_path(path: str, size: int, *, lfs: bool) -> Finding | None:
    """Why the Hub would refuse a file of this name and size; None where it would not."""
    if not is_safe(path) or ".git" in path.split("/"):
        return Finding("path-refused", "error", f"{path!a} cannot be the name of a file in a repository")
    if size > MAX_REGULAR and not lfs:
        return Finding("file-refused", "error", f"{path}: {size} bytes are too many for a file outside LFS")
    return None
