"""One family or several: what decides between families that explain a file equally well, in words a person can check."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from hubtool.layouts import tables
from hubtool.layouts.detect import Match

MOST_CONTRADICTIONS = 0.02  # of the shapes checked
_ARCHITECTURE = ("modelspec.architecture", "ss_base_model_version", "ss_network_module")
_NAMES = ("modelspec.title", "ss_output_name", "name", "ss_sd_model_name")
_WORD = re.compile(r"[a-z]+\d*|\d+")

Verdict = tuple[str | None, tuple[str, ...], tuple[str, ...]]  # family, candidates, evidence sentences


def verdict(found: tuple[Match, ...], metadata: Mapping[str, str]) -> Verdict:
    """The family of a file, or the candidates it cannot choose between. Depth decides first, then what the trainer wrote."""
    if not found:
        return None, (), ("no family's module names cover this file",)
    best = found[0]
    evidence = [f"{len(best.found)} module names are those of {', '.join(one.family for one in found)}"]
    if best.checked:
        evidence.append(f"{best.checked - len(best.contradictions)} of {best.checked} weight shapes agree")
    left = found
    for narrow in (_by_receipt, _by_depth, _by_claim, _by_name):
        left, said = narrow(left, metadata) if len(left) > 1 else (left, "")
        evidence += [said] if said else []
    heads, said = _by_descent(left)
    evidence += [said] if said else []
    candidates = tuple(dict.fromkeys(one.family for one in (*heads, *left)))
    settled = len(heads) == 1 and len(heads[0].contradictions) <= MOST_CONTRADICTIONS * heads[0].checked
    return (candidates[0] if settled else None), candidates, tuple(evidence)


def remembered(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The families that hubtool took a file for when it converted it. A hint like any other: names and shapes must bear it out."""
    try:
        families = json.loads(metadata.get("hubtool.origin", "{}")).get("families", ())
        return tuple(name for name in families if name in tables.family_ids())
    except (ValueError, AttributeError, TypeError, RecursionError):
        return ()


def _by_receipt(found: tuple[Match, ...], metadata: Mapping[str, str]) -> tuple[tuple[Match, ...], str]:
    families = remembered(metadata)
    left = tuple(one for one in found if one.family in families)
    return (left, f"its receipt of origin says {', '.join(one.family for one in left)}") if left else (found, "")


def _by_depth(found: tuple[Match, ...], _: Mapping[str, str]) -> tuple[tuple[Match, ...], str]:
    """A file that reaches the last block of one family and not of another was made for the one."""
    whole = tuple(one for one in found if one.ends)
    if not whole or len(whole) == len(found):
        return found, ""
    return whole, f"its blocks end where those of {', '.join(one.family for one in whole)} end"


def _by_claim(found: tuple[Match, ...], metadata: Mapping[str, str]) -> tuple[tuple[Match, ...], str]:
    """A hint only: the architecture a trainer wrote, among the families that fit anyway."""
    for key in _ARCHITECTURE:
        text = metadata.get(key, "").partition("/")[0].lower()
        named = tuple(one for one in found if text in tables.family(one.family).claims)
        if text and len(named) == 1:
            return named, f"names and shapes fit several families; {key} says {text!r}"
    return found, ""


def _by_name(found: tuple[Match, ...], metadata: Mapping[str, str]) -> tuple[tuple[Match, ...], str]:
    """A weaker hint: exactly one of the families is named in the title that the trainer or its user gave."""
    for key in _NAMES:
        words = set(_WORD.findall(metadata.get(key, "").lower()))
        named = tuple(one for one in found if words & _words(one.family))
        if len(named) == 1:
            return named, f"names and shapes fit several families; {key} {metadata[key]!r} names {named[0].family}"
    return found, ""


def _by_descent(found: tuple[Match, ...]) -> tuple[tuple[Match, ...], str]:
    """A family that took its modules from another does not claim the other's files; it stays a candidate."""
    names = {one.family for one in found}
    left = tuple(one for one in found if tables.family(one.family).descends_from not in names)
    if len(left) == len(found):
        return found, ""
    heirs = ", ".join(one.family for one in found if one not in left)
    return left, f"{heirs} has the same modules, taken from {', '.join(one.family for one in left)}"


def _words(family: str) -> set[str]:
    """``flux1`` is called flux1 or flux."""
    return {family, family.rstrip("0123456789"), *(text for text in _WORD.findall(family) if len(text) > 3)}
