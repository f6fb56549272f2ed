"""The fields of the query language: one row of a table each. ``ls``, ``fields``, sorting and the error messages read it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from hubtool.errors import UsageProblem
from hubtool.registry import values
from hubtool.registry.conditions import Anything, Between, Condition, Contains, Member, OneOf, StartsWith
from hubtool.registry.text import fold

SEEN = "l.state <> 'superseded'"  # every place that still counts, missing ones included


@dataclass(frozen=True, slots=True)
class Field:
    """A searchable fact. ``sql``: the (folded) expression; ``source``: where it comes from when an artifact has many values.

    ``type`` decides how the value is read: word (exact), text (contains), set, number, size, time, digest.
    """

    name: str
    type: str
    sql: str
    help: str
    source: str | None = None

    def clause(self, test: str) -> str:
        """SQL that is 1 or 0, never NULL, when ``test`` is SQL on ``sql``: NOT must work on artifacts without a value."""
        if self.source:
            return f"EXISTS (SELECT 1 FROM {self.source} AND {test})"
        return f"({self.sql} IS NOT NULL AND {test})"

    @property
    def order(self) -> str:
        """What to sort by."""
        return f"(SELECT MIN({self.sql}) FROM {self.source})" if self.source else self.sql


_PLACE = f"location l JOIN root r ON r.id = l.root_id WHERE l.artifact_id = a.id AND {SEEN}"
_ENTRY = "entry_artifact ea JOIN entry e ON e.id = ea.entry_id WHERE ea.artifact_id = a.id AND ea.role <> 'previous'"
_TAG = (
    "entry_artifact ea JOIN entry_tag et ON et.entry_id = ea.entry_id JOIN tag t ON t.id = et.tag_id "
    "WHERE ea.artifact_id = a.id AND ea.role <> 'previous'"
)

FIELDS = {
    field.name: field
    for field in (
        Field("kind", "word", "a.kind", "lora, textual_inversion, checkpoint, vae ..."),
        Field("algorithm", "word", "a.algorithm", "lora, loha, lokr, oft ..."),
        Field("family", "word", "a.family", "sd1, sdxl, flux1 ..."),
        Field("layout", "word", "a.layout", "kohya/sgm, peft/diffusers ..."),
        Field("format", "word", "a.format", "safetensors, torch-zip ..."),
        Field("health", "word", "a.health", "ok, suspect, corrupt, unreadable"),
        Field("id", "digest", "a.uid", "the beginning of an id"),
        Field("base", "text", "a.base_key", "base model by the metadata, else by the card of its repository"),
        Field("title", "text", "a.title_key", "title in the metadata"),
        Field("dtype", "set", "a.dtypes", "f16, bf16, f32 ..."),
        Field("size", "size", "a.size", "bytes: >100M, 10M..2G, 900MiB"),
        Field("rank", "number", "a.rank", "largest rank"),
        Field("alpha", "number", "a.alpha", "largest alpha"),
        Field("tensors", "number", "a.tensors", "number of tensors"),
        Field("parameters", "number", "a.parameters", "number of parameters"),
        Field("added", "time", "a.added_at", "when the library first saw it: 2025-06, -2w.."),
        Field("path", "text", "(r.path_key || '/' || l.path_key)", "absolute path", _PLACE),
        Field("name", "text", "l.name_key", "file name", _PLACE),
        Field("state", "word", "l.state", "present, offline, missing", _PLACE),
        Field("trigger", "text", "w.text_key", "trigger words", "trigger_word w WHERE w.artifact_id = a.id"),
        Field("tag", "word", "t.name_key", "your tags", _TAG),
        Field("rating", "number", "e.rating", "your rating, 0 to 5", _ENTRY),
        Field("note", "text", "e.search_text", "your title and notes", _ENTRY),
        Field("hash", "digest", "h.value", "any hash, from 6 digits on", "hash h WHERE h.artifact_id = a.id"),
        Field("finding", "word", "f.code", "code of a finding", "finding f WHERE f.artifact_id = a.id"),
        Field(
            "metadata",
            "text",
            "d.search_text",
            "text in the file's metadata",
            "artifact_doc d WHERE d.artifact_id = a.id",
        ),
        Field("relpath", "text", "l.path_key", "path below the scanned folder", _PLACE),
        Field("sha256", "digest", "a.sha256", "hash of the whole file"),
        Field("child", "number", "g.child_id", "made into another artifact", "lineage g WHERE g.parent_id = a.id"),
        Field("parent", "text", "g.parent_ref", "made from this hash or path", "lineage g WHERE g.child_id = a.id"),
    )
}
ALIASES = {
    "algo": "algorithm",
    "file": "name",
    "triggers": "trigger",
    "tags": "tag",
    "base_model": "base",
    "notes": "note",
}
TEXT = ("title", "relpath", "metadata", "trigger", "tag", "note")  # where a bare word is looked for
_STATES = {"present", "offline", "missing", "trashed"}
FLAGS: dict[str, tuple[str, Condition, bool]] = {  # is:FLAG -> field, condition, negated
    **{state: ("state", OneOf((state,)), False) for state in sorted(_STATES)},
    "corrupt": ("health", OneOf(("corrupt", "unreadable")), False),
    "ok": ("health", OneOf(("ok",)), False),
    "hashed": ("sha256", Anything(), False),
    "unhashed": ("sha256", Anything(), True),
}
HAS = {
    "trigger",
    "tag",
    "note",
    "finding",
    "parent",
    "child",
    "hash",
    "rating",
    "title",
    "base",
    "family",
    "rank",
    "alpha",
}


def field(name: str) -> Field:
    """The field called ``name``, an alias or any case. Raises UsageProblem naming the nearest one."""
    key = name.lower()
    if found := FIELDS.get(ALIASES.get(key, key)):
        return found
    raise unknown(
        "field",
        name,
        (*FIELDS, *ALIASES, "is", "has", "no", "sort", "limit"),
        'hubtool fields; or quote the text: "a:b"',
    )


def unknown(what: str, name: str, known: Sequence[str], hint: str) -> UsageProblem:
    """UsageProblem for a name that does not exist, with the nearest that does."""
    near = get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return UsageProblem(f"unknown {what} {name!r}" + (f", did you mean {near[0]!r}?" if near else ""), hint=hint)


def condition(target: Field, operator: str, value: str, now: float | None = None) -> Condition:
    """Read ``value``: ``operator`` is ``""`` (the field's own way), ``~`` (contains) or ``=`` (exact)."""
    if not value:
        raise UsageProblem(f"{target.name}: needs a value", hint=f"{target.name}: {target.help}")
    if operator == "~":
        return _text_only(target, Contains(fold(value)))
    if operator == "=" and target.type in {"word", "text"}:
        return OneOf((fold(value),))
    moment = time.time() if now is None else now
    return _READ[target.type](value, moment)


def _text_only(target: Field, found: Condition) -> Condition:
    if target.type in _NUMERIC:
        raise UsageProblem(f"{target.name} is a {target.type}: '~' works on text", hint=f"{target.name}:8..32")
    return found


def _words(value: str) -> tuple[str, ...]:
    return tuple(fold(word) for word in value.split(",") if word) or (fold(value),)


def _digest(value: str) -> Condition:
    return StartsWith(fold(value).removeprefix("0x").removeprefix("sha256:"))


def _interval(parse: Callable[[str], values.Span]) -> Callable[[str, float], Between]:
    return lambda value, _now: values.interval(value, parse)


_NUMERIC = {"number", "size", "time"}
_READ: dict[str, Callable[[str, float], Condition]] = {
    "word": lambda value, _now: OneOf(_words(value)),
    "text": lambda value, _now: Contains(fold(value)),
    "set": lambda value, _now: Member(_words(value)),
    "digest": lambda value, _now: _digest(value),
    "number": _interval(values.number),
    "size": _interval(values.size),
    "time": lambda value, now: values.interval(value, lambda text: values.moment(text, now)),
}
