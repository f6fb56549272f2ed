"""How to publish a repository once more: the same artifacts, layouts and family as the last time, from the receipt and its index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hubtool.actions.publish_facts import Said
from hubtool.actions.publish_result import Options
from hubtool.errors import HubtoolError
from hubtool.registry import browse, hub_facts
from hubtool.registry.hub_facts import Origin, PublishedFile
from hubtool.registry.records import Reader

_WEIGHTS = (".safetensors", ".pt", ".bin")
_MADE = frozenset(
    {"layout", "original", "peft"}
)  # made of the first artifact beside the canonical file, each in its own way


@dataclass(frozen=True, slots=True)
class Again:
    """What to hand to ``publish``."""

    refs: tuple[str, ...]
    said: Said
    options: Options


def again(reader: Reader, origin: Origin, index: Mapping[str, Any]) -> Again:
    """The publication that ``origin`` came from. ``index``: hubtool.json of the repository, as a hint: it may be anything at all.

    Raises HubtoolError where the library does not know what every file was made of, or does not have it any more.
    """
    receipt = hub_facts.last_receipt(reader, origin.endpoint, origin.repo, origin.revision)
    roles = _roles(index)
    files = [file for file in (receipt.files if receipt else ()) if not roles or file.path in roles]
    once = _sources(files, roles)
    if once is None:
        problem = "the last publication held files that were made for it, and cannot be repeated by itself"
        raise HubtoolError(problem, hint=f"hubtool publish FILE... {origin.repo}")
    rows = [roles[file.path] for file in files if file.path in roles and file.artifact is not None]
    original = any(row.get("role") == "original" for row in rows)
    options = Options(revision=origin.revision, layouts=tuple(_layouts(rows)), keep_original=original)
    return Again(tuple(_paths(reader, once, origin)), _said(index), options)


def _sources(files: Sequence[PublishedFile], roles: Mapping[str, Mapping[str, Any]]) -> list[PublishedFile] | None:
    """One file of each artifact that was named; None where some file of weights cannot be traced to one."""
    ours = [file for file in files if file.artifact is not None]
    once = [file for file in ours if roles.get(file.path, {}).get("role") not in _MADE]
    once = once or ours  # a PEFT adapter that diffusers cannot read
    traced = set(_weights(files)) <= set(ours) and len({file.artifact for file in once}) >= len(_weights(once))
    return once if once and traced else None


def _roles(index: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What the index says about every file of ours; empty where there is none that can be read."""
    from hubtool.hub.uploads import Remote

    return Remote(index=index).ours


def _weights(files: Sequence[PublishedFile]) -> list[PublishedFile]:
    return [file for file in files if file.path.endswith(_WEIGHTS)]


def _layouts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The further layouts of the first artifact. PEFT files are no layout of a folder that was one: asked for again, nothing is added."""
    named = [str(row["layout"]) for row in rows if row.get("role") == "layout" and isinstance(row.get("layout"), str)]
    peft = ["peft"] if any(row.get("role") == "peft" for row in rows) else []
    return [*dict.fromkeys(named), *peft]


def _said(index: Mapping[str, Any]) -> Said:
    """Only the family: the rest of what was said is taken from the index by ``publish`` itself."""
    card = index.get("card")
    said = Said().over(card.get("said") if isinstance(card, Mapping) else None)
    return Said(family=said.family)


def _paths(reader: Reader, files: Sequence[PublishedFile], origin: Origin) -> list[str]:
    """Where the artifacts lie now, in the order of the last publication."""
    follow, paths = hub_facts.successors(reader), []
    for file in sorted(files, key=lambda file: (file.path.count("/"), file.path)):
        row = browse.by_key(reader, follow.get(file.artifact or 0, file.artifact or 0))
        place = next((place for place in row.places if place.state == "present"), None)
        if place is None:
            problem = f"{file.path} was published too, and is no longer here"
            raise HubtoolError(problem, hint=f"hubtool publish FILE... {origin.repo}")
        paths.append(place.path)
    return list(dict.fromkeys(paths))
