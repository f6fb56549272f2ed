"""``mv``: files to another folder, or into folders and names made from what the library knows. Nothing is ever overwritten."""

from __future__ import annotations

import os
import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubtool.actions import moving
from hubtool.actions.choosing import choose_places
from hubtool.actions.companions import companions
from hubtool.actions.undo import settle
from hubtool.errors import HubtoolError, UsageProblem, WouldOverwrite
from hubtool.registry import browse, journal
from hubtool.registry.records import Place, Reader, Row
from hubtool.registry.store import Store

FIELDS = (
    "stem",
    "ext",
    "id",
    "kind",
    "algorithm",
    "family",
    "base",
    "title",
    "rank",
    "layout",
    "format",
    "sha256",
    "tag",
    "trigger",
)
_BAD = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*]+')
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
_MAX_NAME = 200  # bytes: file systems take 255, and an extension comes behind


@dataclass(frozen=True, slots=True)
class Relocation:
    """One file or folder and where it goes; ``beside``: (from, to) of what goes with it."""

    row: Row
    place: Place
    target: str
    beside: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.row.id,
            "path": self.place.path,
            "to": self.target,
            "with": [list(pair) for pair in self.beside],
        }


@dataclass(slots=True)
class Outcome:
    """What became of a move: (from, to) pairs; ``failed`` maps paths to reasons; ``journal`` is the id for ``undo``."""

    moved: list[tuple[str, str]] = field(default_factory=list)
    failed: dict[str, HubtoolError] = field(default_factory=dict)
    journal: str | None = None

    def to_json(self) -> dict[str, Any]:
        failed = {path: error.to_json() for path, error in self.failed.items()}
        return {
            "moved": [{"from": old, "to": new} for old, new in self.moved],
            "failed": failed,
            "journal": self.journal,
        }


def plan(reader: Reader, words: Sequence[str], folder: Path | None, template: str | None) -> list[Relocation]:
    """Where every present file of the chosen artifacts would go. ``folder``: None for the scanned folder it lies in.

    ``template``: ``{family}/{base|unknown}/{stem}``; the extension is added. Raises UsageProblem for a template that makes no sense,
    WouldOverwrite where two files, or a file and what is there, would meet.
    """
    if folder is None and template is None:
        raise UsageProblem("say where to", hint="--to FOLDER, or --template '{family}/{stem}'")
    indexed = {place.path for place in browse.places(reader)}
    roots = [os.fsdecode(bytes(row[0])) for row in reader.rows("SELECT path FROM root")]
    found = []
    for row, place in choose_places(reader, words):
        if place.state != "present":
            continue
        base = folder or Path(_root(roots, place.path))
        target = base / name(template or "{stem}", row, place)
        if str(target) != place.path:
            found.append(Relocation(row, place, str(target), _beside(place, target, indexed)))
    _refuse_meetings(found)
    return found


def _root(roots: Sequence[str], path: str) -> str:
    return max((root for root in roots if path.startswith(root.rstrip("/") + "/")), key=len)


def name(template: str, row: Row, place: Place) -> str:
    """The path below the folder that a template gives for a file. Raises UsageProblem for a field that does not exist."""
    path = Path(place.path)
    extension = (
        ""
        if place.link == "folder"
        else ".safetensors.index.json"
        if path.name.endswith(".index.json")
        else path.suffix
    )
    values = _values(row, path.name.removesuffix(extension), extension)
    parts = [_part(part, values) for part in template.replace("\\", "/").split("/")]
    if not all(parts):
        raise UsageProblem(f"{template} gives no name for {path.name}", hint="a fallback helps: {base|unknown}")
    return "/".join(parts) + extension


def _values(row: Row, stem: str, extension: str) -> dict[str, str]:
    known = {"base": row.base_model, "tag": next(iter(row.tags), None), "trigger": next(iter(row.trigger_words), None)}
    facts = {name: getattr(row, name) for name in FIELDS if hasattr(row, name)}
    values = {**facts, **known, "stem": stem, "ext": extension.removeprefix(".")}
    return {name: "" if value is None else str(value) for name, value in values.items()}


def _part(part: str, values: Mapping[str, str]) -> str:
    """One folder or file name: ``{field}``, ``{field|fallback}`` and text, made safe for every file system."""
    try:
        pieces = list(string.Formatter().parse(part))
    except ValueError as error:
        raise UsageProblem(f"the template cannot be read: {error}", hint="{family}/{base|unknown}/{stem}") from error
    made = "".join(text + ("" if field is None else _value(field, values)) for text, field, _, _ in pieces)
    safe = _BAD.sub("_", unicodedata.normalize("NFC", made)).strip(" .")
    cut = safe.encode()[:_MAX_NAME].decode("utf-8", "ignore").strip(" .")
    return f"_{cut}" if _RESERVED.fullmatch(cut) else cut


def _value(field: str, values: Mapping[str, str]) -> str:
    key, _, fallback = field.partition("|")
    if key not in values:
        raise UsageProblem(f"a template has no field {key!r}", hint=f"fields: {', '.join(FIELDS)}")
    return values[key] or fallback


def _beside(place: Place, target: Path, indexed: set[str]) -> tuple[tuple[str, str], ...]:
    if place.link == "folder":
        return ()
    path = Path(place.path)
    old, new = _stem(path), _stem(target)
    return tuple((str(file), str(target.with_name(new + file.name[len(old) :]))) for file in companions(path, indexed))


def _stem(path: Path) -> str:
    return path.name.removesuffix(".safetensors.index.json") if path.name.endswith(".index.json") else path.stem


def _refuse_meetings(found: Sequence[Relocation]) -> None:
    seen: dict[str, str] = {}
    pairs = [pair for one in found for pair in ((one.place.path, one.target), *one.beside)]
    for source, target in pairs:
        key = target.casefold()  # also one file where names are compared without case
        if key in seen:
            raise WouldOverwrite(
                f"{seen[key]} and {source} would both go there", path=target, hint="add {id} to the template"
            )
        seen[key] = source
        if os.path.lexists(target) and not os.path.samefile(source, target):
            raise WouldOverwrite("something lies there already", path=target, hint="add {id} to the template")


def move(store: Store, relocations: Sequence[Relocation]) -> Outcome:
    """Carry a plan out, journalled. A file that cannot be moved stays, with what belongs to it, and stops no other."""
    steps = [step for one in relocations for step in _steps(one)]
    key = journal.begin(store, "mv", f"move {len(relocations)} files", [("move", details) for details in steps])
    outcome = Outcome()
    for position, details in enumerate(steps):
        source, target = details["from"], details["to"]
        if details["of"] in outcome.failed:
            continue
        try:
            moving.move(Path(source), Path(target))
            settle(store, details["location"], Path(target))
            with store.transaction() as connection:
                journal.mark(connection, key, position, details)
            outcome.moved.append((source, target))
        except HubtoolError as error:
            outcome.failed[details["of"]] = error
    journal.close(store, key, journal.DONE)
    outcome.journal = journal.records(store, 1)[0].uid
    return outcome


def _steps(one: Relocation) -> list[dict[str, Any]]:
    """The shards of an index go before it, sidecars after their file: a file that fails must not lose them."""
    own = {"from": one.place.path, "to": one.target, "location": one.place.id, "of": one.place.path}
    beside = [{"from": old, "to": new, "location": None, "of": one.place.path} for old, new in one.beside]
    return [*beside, own] if one.place.path.endswith(".index.json") else [own, *beside]
