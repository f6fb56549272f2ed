"""Model cards: YAML front matter and a body in which hubtool owns marked blocks and nothing else.

A re-publication merges three texts, as git does: what hubtool wrote last (``Record``, kept in the repository's index), what the card says
now, and what hubtool would write. What a person changed stays; comments and the order of keys stay, for only changed keys are rewritten.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from hubtool.errors import CorruptFile, MissingExtra

ORDER = (
    "base_model", "base_model_relation", "library_name", "pipeline_tag", "license", "license_name", "license_link", "instance_prompt",
    "tags", "widget",
)  # fmt: skip
_FRONT = re.compile(r"\A\ufeff?---[ \t]*\n(.*?\n)??---[ \t]*(?:\n|\Z)", re.DOTALL)
_KEY = re.compile(r"([A-Za-z_][\w-]*|\"[^\"]+\"|'[^']+')[ \t]*:(?:\s|$)")
_BLOCK = re.compile(
    r"^<!-- hubtool:begin ([a-z-]+) -->[ \t]*\n(.*?)^<!-- hubtool:end \1 -->[ \t]*$", re.DOTALL | re.MULTILINE
)
_LINE = re.compile(r"[^\n]*\n|[^\n]+\Z")  # not splitlines(): it knows ends of lines that YAML does not
_EMPTY: Mapping[str, Any] = MappingProxyType({})
_ODD_ENDS = frozenset("\x85\u2028\u2029\ufeff")
_MAX_CARD = 2 << 20


@dataclass(frozen=True, slots=True)
class Card:
    """A parsed card. ``source``: the text of the front matter as it stands; ``body``: everything after it."""

    front: Mapping[str, Any]
    body: str
    source: str = ""

    @property
    def blocks(self) -> dict[str, str]:
        """The text of every marked block by name."""
        return {match[1]: match[2] for match in _BLOCK.finditer(self.body)}

    def __str__(self) -> str:
        text = edit(self.source, self.front)
        return f"---\n{text}---\n{self.body}" if text else self.body


@dataclass(frozen=True, slots=True)
class Record:
    """What hubtool wrote last: the front matter, and a hash of each block."""

    front: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)
    blocks: Mapping[str, str] = field(default_factory=lambda: _EMPTY)

    def to_json(self) -> dict[str, Any]:
        return {"front": dict(self.front), "blocks": dict(self.blocks)}


def record(card: Card) -> Record:
    """What to remember of a card that hubtool has just made."""
    return Record(card.front, {name: _digest(text) for name, text in card.blocks.items()})


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()


def read_record(document: Any) -> Record | None:
    """The record in an index; None where there is none that can be read."""
    if not isinstance(document, Mapping):
        return None
    front, blocks = document.get("front"), document.get("blocks")
    return Record(front, blocks) if isinstance(front, Mapping) and isinstance(blocks, Mapping) else None


def parse(text: str, path: str = "README.md") -> Card:
    """Read a card. Raises ``CorruptFile`` for a front matter that is no YAML mapping."""
    if len(text) > _MAX_CARD:
        raise CorruptFile(f"a card of {len(text)} characters", path=path)
    text = text.replace("\r\n", "\n")
    match = _FRONT.match(text)
    if match is None:
        return Card({}, text)
    source = match[1] or ""
    return Card(load_yaml(source, path), text[match.end() :], source)


def _yaml() -> Any:
    try:
        import yaml  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise MissingExtra("model cards", "hub") from None
    return yaml


def load_yaml(text: str, path: str = "README.md") -> dict[str, Any]:
    """A YAML mapping, read safely; a key that stands there twice is refused. Raises ``CorruptFile``."""
    yaml = _yaml()
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise CorruptFile("the front matter is not a mapping", path=path)
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise CorruptFile(f"the front matter has {twice!a} twice", path=path)
        return dict(yaml.safe_load(text))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        line = str(getattr(error, "problem", None) or error).split("\n", maxsplit=1)[0]
        mark = getattr(error, "problem_mark", None)
        at = f" in line {mark.line + 2}" if mark else ""
        raise CorruptFile(f"the front matter is not YAML: {line}{at}", path=path, hint="mend it by hand") from None


def dump_yaml(value: Mapping[str, Any]) -> str:
    """YAML of a mapping in its own order; everything a person could misread as another type is quoted."""
    if not value:
        return ""
    dump = _yaml().safe_dump
    text = str(dump(dict(value), sort_keys=False, allow_unicode=True, width=1000))
    # PyYAML writes these as they are and reads them as line ends
    return str(dump(dict(value), sort_keys=False, width=1000)) if _ODD_ENDS & set(text) else text


def edit(source: str, front: Mapping[str, Any]) -> str:
    """``source`` changed to say ``front``: untouched keys keep their very text, with their comments."""
    before = load_yaml(source) if source else {}
    lines = []
    for key, chunk in _chunks(source):
        if key is None or (key in front and front[key] == before.get(key)):
            lines.append(chunk)
        elif key in front:
            lines.append(_comments(chunk) + dump_yaml({key: front[key]}))
    text = "".join(lines)
    text += "".join(dump_yaml({key: front[key]}) for key in front if key not in before)
    return text if not text or load_yaml(text) == dict(front) else dump_yaml(front)


def _chunks(source: str) -> Iterator[tuple[str | None, str]]:
    """The text of each top-level key with the comments before it; text without a key at the end."""
    key: str | None = None
    held: list[str] = []  # comments and blank lines that belong to what follows
    chunk: list[str] = []
    for line in _LINE.findall(source):
        match = _KEY.match(line)
        if match:
            if chunk:
                yield key, "".join(chunk)
            key, chunk, held = match[1].strip("\"'"), [*held, line], []
        elif line.startswith("#") or not line.strip():
            held.append(line)
        else:
            chunk += [*held, line]
            held = []
    if chunk:
        yield key, "".join(chunk)
    if held:
        yield None, "".join(held)


def _comments(chunk: str) -> str:
    lines = _LINE.findall(chunk)
    first = next((at for at, line in enumerate(lines) if _KEY.match(line)), 0)
    return "".join(lines[:first])


def marked(name: str, text: str) -> str:
    """A block of ours in a body."""
    return f"<!-- hubtool:begin {name} -->\n{text.rstrip()}\n<!-- hubtool:end {name} -->\n"


@dataclass(frozen=True, slots=True)
class Merged:
    """A card after a merge. ``kept``: what a person wrote and hubtool therefore left alone."""

    card: Card
    kept: tuple[str, ...] = ()


def merge(theirs: Card | None, ours: Card, base: Record | None, forced: Collection[str] = ()) -> Merged:
    """The card to publish. ``forced``: keys of the front matter that were asked for now and win over everything."""
    if theirs is None or not (theirs.front or theirs.body.strip()):
        return Merged(ours)
    front, kept = _merge_front(theirs.front, ours.front, base.front if base else None, forced)
    body, edited = _merge_body(theirs.body, ours.body, base.blocks if base else {})
    return Merged(Card(front, body, theirs.source), (*kept, *edited))


def _merge_front(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], base: Mapping[str, Any] | None, forced: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    front, kept = dict(theirs), []
    for key in dict.fromkeys((*ours, *(base or ()))):
        old, new, now = (base or {}).get(key), ours.get(key), theirs.get(key)
        if key in forced or now == old:
            chosen = new
        elif key == "tags" and isinstance(now, list) and isinstance(new, list):
            chosen = _merge_list(now, new, old if isinstance(old, list) else [])
        else:
            chosen = now
            if now != new:
                kept.append(key)
        if chosen is None:
            front.pop(key, None)
        else:
            front[key] = chosen
    return front, kept


def _merge_list(theirs: list[Any], ours: list[Any], base: list[Any]) -> list[Any]:
    """A person's additions and removals, and ours."""
    gone = [item for item in base if item not in theirs or item not in ours]
    return [item for item in dict.fromkeys((*theirs, *ours)) if item not in gone]


def _merge_body(theirs: str, ours: str, base: Mapping[str, str]) -> tuple[str, list[str]]:
    mine = {match[1]: match[2] for match in _BLOCK.finditer(ours)}
    edited: list[str] = []
    present: set[str] = set()

    def replaced(match: re.Match[str]) -> str:
        name, text = match[1], match[2]
        present.add(name)
        if name in base and _digest(text) != base[name]:
            edited.append(f"block {name}")
            return match[0]
        return marked(name, mine[name]).rstrip("\n") if name in mine else ""

    body = _BLOCK.sub(replaced, theirs)
    for name, text in mine.items():
        if name not in present and name not in base:  # in the base and gone: a person took it out
            body = f"{body.rstrip()}\n\n{marked(name, text)}"
    return body, edited


def difference(before: str | None, after: str, path: str = "README.md") -> str:
    """A unified diff; empty where nothing changes."""
    old = (before or "").splitlines(keepends=True)
    lines = difflib.unified_diff(
        old, after.splitlines(keepends=True), f"a/{path}" if before else "/dev/null", f"b/{path}"
    )
    return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)
