"""The document inside a text: JSON, or YAML where PyYAML is installed. Recipes come from strangers too: size, depth and aliases are bounded."""

from __future__ import annotations

from typing import Any

from hubtool.errors import CorruptFile, MissingExtra, UnsafeFile
from hubtool.tensors.strict_json import JsonError, TooDeepError, loads

MAX_BYTES = 4 << 20
_MAX_DEPTH = 64


def parse(text: str) -> Any:
    """The document. Raises ``CorruptFile`` where it is neither JSON nor YAML, ``UnsafeFile`` where it abuses the parser, ``MissingExtra``."""
    raw = text.encode("utf-8", "surrogatepass")
    if len(raw) > MAX_BYTES:
        raise UnsafeFile(f"a recipe of {len(raw)} bytes; {MAX_BYTES} are the limit")
    if not text.lstrip("\ufeff \t\r\n").startswith("{"):
        return _yaml(text)
    try:
        return loads(raw, max_depth=_MAX_DEPTH)
    except TooDeepError as error:
        raise UnsafeFile(str(error)) from None
    except JsonError as error:
        raise CorruptFile(str(error)) from None


def _yaml(text: str) -> Any:
    try:
        import yaml  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise MissingExtra("a recipe in YAML", "yaml") from None
    try:
        _check_events(yaml, text)
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CorruptFile(f"neither JSON nor YAML: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _check_events(yaml: Any, text: str) -> None:
    """Refuse aliases (a few lines can stand for gigabytes), deep nesting and repeated keys, before any object is made."""
    frames: list[list[Any]] = []  # one per open collection: [is a mapping, keys seen, a key comes next]
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise UnsafeFile("a recipe in YAML has no aliases")
        if isinstance(event, yaml.CollectionEndEvent):
            frames.pop()
            continue
        if isinstance(event, yaml.NodeEvent):
            _note(event, frames, getattr(event, "value", None))
        if isinstance(event, yaml.CollectionStartEvent):
            if len(frames) >= _MAX_DEPTH:
                raise UnsafeFile(f"nested deeper than {_MAX_DEPTH}")
            frames.append([isinstance(event, yaml.MappingStartEvent), set(), True])


def _note(event: Any, frames: list[list[Any]], value: str | None) -> None:
    """Account for a node in the mapping that is open: keys and values take turns."""
    if not frames or not frames[-1][0]:
        return
    frame = frames[-1]
    if frame[2]:
        if value in frame[1]:
            raise CorruptFile(f"the key {str(value)[:60]!a} comes twice (line {event.start_mark.line + 1})")
        frame[1].add(value)
    frame[2] = not frame[2]
