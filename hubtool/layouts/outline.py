"""The names of an adapter file without its numbers: which syntax, which families, which key is which role of which module.

No tensor is read here, so that a header kept from another time (a receipt) can be outlined like a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from hubtool.adapters.ir import ModuleKey
from hubtool.errors import CorruptFile
from hubtool.layouts import detect, keys, modules, tables, vocabulary
from hubtool.layouts.detect import Match
from hubtool.layouts.keys import BUNDLE, Reading
from hubtool.layouts.modules import Draft
from hubtool.layouts.naming import Place
from hubtool.layouts.tables import Layout, Syntax
from hubtool.layouts.verdict import MOST_CONTRADICTIONS, remembered, verdict
from hubtool.tensors.ref import TensorRef

if TYPE_CHECKING:
    from hubtool.layouts.positional import Placed

RAW = "raw"  # the naming of modules no vocabulary knows
_NONE: Mapping[Any, Any] = MappingProxyType({})
_LEAST_SHARE = 0.5  # of a component's modules that a family must know by name

RoleKey = tuple[str, str, str]  # component, canonical path, role


class Outline(NamedTuple):
    """``modules``: (component, path) -> roles and keys; the path is canonical; a fused module has those of its parts, joined by +.

    ``places``: how each of them stands to the canonical modules (absent: the same). ``sizes``: component -> the model of the family that fits.
    ``unnamed``: modules outside the family's vocabulary. ``spare``: other keys.
    """

    syntax: Syntax
    layout: Layout
    family: str | None
    candidates: tuple[str, ...]
    modules: Mapping[ModuleKey, Draft]
    unnamed: tuple[str, ...]
    spare: tuple[str, ...]
    evidence: tuple[str, ...]
    contradictions: tuple[str, ...] = ()
    checked: int = 0
    places: Mapping[ModuleKey, Place] = _NONE
    sizes: Mapping[str, str] = _NONE

    def keys(self) -> dict[RoleKey, str]:
        """(component, path, role) -> key."""
        return {(c, p, role): key for (c, p), draft in self.modules.items() for role, key in draft.keys.items()}


def outline(
    tensors: Mapping[str, TensorRef],
    path: Path,
    *,
    structure: object = None,
    family: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Outline | None:
    """Outline a set of tensors; None when no syntax explains any. Raises ``CorruptFile`` for keys that contradict each other.

    ``metadata`` is a hint where names and shapes fit several families, never evidence against them.
    """
    placed = _by_position(structure, tensors)
    if placed is not None:
        return _from_positions(placed, family)
    reading = keys.read(tensors)
    return _from_names(tensors, path, reading, family, metadata or {}) if reading else None


def _by_position(structure: object, tensors: Mapping[str, TensorRef]) -> Placed | None:
    """What a file says by position; the rest of that is only looked at where a list, or a colon in a key, lets it be."""
    if not isinstance(structure, list) and not any(":" in key for key in tensors):
        return None
    from hubtool.layouts import positional

    return positional.read(structure, tensors)


def _from_names(
    tensors: Mapping[str, TensorRef], path: Path, reading: Reading, family: str | None, metadata: Mapping[str, str]
) -> Outline:
    _refuse_mixture(path, reading)
    _refuse_twins(path, reading)
    drafts = modules.group(reading.spelled, tensors, path)
    found = _families(reading.syntax, drafts, family, remembered(metadata))
    best = found[0] if found else None
    named, places, unnamed = _place(drafts, best, path)
    settled, candidates, evidence = verdict(found, metadata)
    return Outline(
        syntax=reading.syntax,
        layout=Layout(reading.syntax.id, _naming(best)),
        family=settled,
        candidates=candidates,
        modules=named,
        unnamed=tuple(unnamed) if best else (),
        spare=tuple(key for key in reading.others if not key.startswith(BUNDLE)),
        evidence=evidence,
        contradictions=best.contradictions if best else (),
        checked=best.checked if best else 0,
        places=places,
        sizes=best.sizes if best else {},
    )


def _refuse_mixture(path: Path, reading: Reading) -> None:
    mixed = keys.foreign(reading)
    if mixed:
        other, count = mixed.most_common(1)[0]
        text = f"{len(reading.spelled)} tensors are spelled as {reading.syntax.id} and {count} as {other}"
        raise CorruptFile(f"{text}: tools would load different parts of this file", path=path)


def _refuse_twins(path: Path, reading: Reading) -> None:
    """A module spelled in two ways at once (lora_down and lora_A): which one counts differs from tool to tool."""
    if not reading.others:
        return
    stems = {cut[0]: one.key for one in reading.spelled for cut in [keys.split_suffix(one.key)] if cut}
    for key in reading.others:
        cut = keys.split_suffix(key)
        if cut is not None and cut[0] in stems:
            text = f"{key} and {stems[cut[0]]} spell one module in two ways"
            raise CorruptFile(f"{text}: tools would load different parts of this file", path=path)


def _families(
    syntax: Syntax, drafts: list[Draft], asked: str | None, hinted: tuple[str, ...] = ()
) -> tuple[Match, ...]:
    """Families whose vocabulary covers every component well, the prefix being theirs; the hinted ones when they know every name."""
    listed = [draft.module() for draft in drafts]
    if asked is None and hinted:
        told = [one for name in hinted for one in detect.match(listed, syntax.joiner, name)]
        whole = tuple(one for one in told if len(one.found) == len(drafts))
        if whole:
            return whole
    matches = detect.match(listed, syntax.joiner, asked)
    return tuple(m for m in matches if _covers(m, drafts) and _plausible(m, drafts) and _own_prefix(m, syntax, drafts))


def _plausible(found: Match, drafts: list[Draft]) -> bool:
    """Shapes may all be strange (a base of reduced width) or some names unknown; both together are another family."""
    strange = len(found.contradictions) > MOST_CONTRADICTIONS * found.checked
    return not (strange and len(found.found) < len(drafts))


def _covers(found: Match, drafts: list[Draft]) -> bool:
    total = Counter(draft.components for draft in drafts)
    hits = Counter(components for _, components, _ in found.found)
    return all(hits[components] >= _LEAST_SHARE * count for components, count in total.items())


def _own_prefix(found: Match, syntax: Syntax, drafts: list[Draft]) -> bool:
    """Where a family has a prefix of its own for a component (lora_te1 for SDXL), files of the family use it."""
    own = tables.family(found.family).prefixes.get(syntax.id, {})
    for draft in drafts:
        component = draft.components[0]
        if component in own and len(draft.components) == 1:
            key = next(iter(draft.keys.values()))
            if not key.startswith(own[component] + syntax.joiner):
                return False
    return True


def _place(
    drafts: list[Draft], found: Match | None, path: Path
) -> tuple[dict[ModuleKey, Draft], dict[ModuleKey, Place], list[str]]:
    """(modules by path, the places of those that are not simply renamed, modules that the family does not know: they keep their spelling)."""
    placed: dict[ModuleKey, Draft] = {}
    places: dict[ModuleKey, Place] = {}
    unnamed = []
    for draft in drafts:
        hit = found.found.get(draft.module_key) if found else None
        key = (hit[0], hit[1].key) if hit else (_only(draft.components), draft.stem)
        if not hit:
            unnamed.append(".".join(key))
        elif hit[1].op != "rename":
            places[key] = hit[1]
        if key in placed:
            first, second = (next(iter(d.keys.values())) for d in (placed[key], draft))
            raise CorruptFile(f"{first} and {second} are the same module {'.'.join(key)}", path=path)
        placed[key] = draft
    return placed, places, unnamed


def _only(components: tuple[str, ...]) -> str:
    return "model" if components == ("*",) else components[0]


def _naming(found: Match | None) -> str:
    """The naming that spells most modules outside the text encoders (text encoders have only one); several share many names."""
    if found is None:
        return RAW
    rows = [(component, place) for component, place in found.found.values() if not component.startswith("text_encoder")]
    seen = Counter(place.naming for _, place in rows)
    if len(seen) < 2:
        return next(iter(seen), "diffusers")
    return max(seen, key=lambda naming: (_spelled_alike(naming, rows, found), seen[naming]))


def _spelled_alike(naming: str, rows: list[tuple[str, Place]], found: Match) -> int:
    """How many of the modules ``naming`` would spell as the file does."""
    tables_ = {c: vocabulary.places(found.family, naming, c, found.sizes[c]) for c in {c for c, _ in rows}}
    mine = ((tables_[component].get(place.parts[0]), place) for component, place in rows)
    return sum(own is not None and own.outside == place.outside for own, place in mine)


def _from_positions(placed: Placed, asked: str | None) -> Outline:
    candidates = tuple(name for name in placed.families if asked in (None, name))
    text = (
        f"{len(placed.drafts)} positions agree in shape with the walk of {', '.join(candidates) or 'no known family'}"
    )
    return Outline(
        syntax=placed.syntax,
        layout=Layout(placed.syntax.id, "index"),
        family=candidates[0] if len(candidates) == 1 else None,
        candidates=candidates,
        modules=placed.drafts,
        unnamed=placed.unplaced,
        spare=placed.others,
        evidence=(text,),
    )
