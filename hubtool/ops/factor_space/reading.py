"""The adapters of a merge: read as one family, and strengths that mean something in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from hubtool.adapters.ir import Adapter
from hubtool.errors import ConversionError, UsageProblem
from hubtool.formats.base import TensorFile
from hubtool.layouts.parse import Parsed, parse_file
from hubtool.ops.strengths import Strengths


@dataclass(frozen=True, slots=True)
class Source:
    """An input and how strong it counts."""

    file: TensorFile
    strengths: Strengths = field(default_factory=Strengths)


def read(sources: Sequence[Source], asked: str | None) -> list[Parsed]:
    """Every input, read as one family; as the candidates they share where no file can tell. Raises ``ConversionError``."""
    found = [parse_file(one.file, asked) for one in sources]
    known = {
        one.adapter.family: source.file.path.name
        for one, source in zip(found, sources, strict=True)
        if one.adapter.family
    }
    if len(known) > 1:
        told = ", ".join(f"{name} is {family}" for family, name in known.items())
        raise ConversionError(
            f"adapters of different families: {told}", hint="an adapter only means something beside its base"
        )
    family = next(iter(known), None)
    found = [_as(family, one, source.file) for one, source in zip(found, sources, strict=True)]
    for one, source in zip(found, sources, strict=True):
        _refuse(one.adapter, source.file)
    return found if family else _shared(found, sources[-1].file)


def _shared(found: list[Parsed], file: TensorFile) -> list[Parsed]:
    """Adapters of unknown family, each with only the candidates that fit all of them."""
    common = tuple(name for name in found[0].candidates if all(name in one.candidates for one in found))
    if not common and any(one.candidates for one in found):
        raise ConversionError(
            "no one family has the modules of all inputs", path=file.path, hint="hubtool explain shows what fits"
        )
    return [replace(one, candidates=common) for one in found]


def _as(family: str | None, parsed: Parsed, file: TensorFile) -> Parsed:
    """An adapter that fits several families, read as the one the others have."""
    if family is None or parsed.adapter.family == family:
        return parsed
    if family not in parsed.candidates:
        told = ", ".join(parsed.candidates) or "no known family"
        raise ConversionError(f"an adapter of {told} beside one of {family}", path=file.path)
    return parse_file(file, family)


def _refuse(adapter: Adapter, file: TensorFile) -> None:
    errors = [finding.message for finding in adapter.findings if finding.severity == "error"]
    if errors:
        raise ConversionError(f"the adapter cannot be merged safely: {errors[0]}", path=file.path)
    if not adapter.patches:
        raise ConversionError("this adapter changes no module", path=file.path, hint=f"hubtool inspect {file.path}")


def check(strengths: Sequence[Strengths], adapters: Sequence[Adapter], family: str | None) -> None:
    """Every part of a strength means some module, and no input counts nothing at all."""
    every = [key for adapter in adapters for key in adapter.patches]
    for one, adapter in zip(strengths, adapters, strict=False):
        lost = one.unmatched(every, family)
        if lost:
            parts = ", ".join(dict.fromkeys(component for component, _ in every))
            raise UsageProblem(
                f"no module is called {lost[0]}", hint=f"the adapters change {parts}; hubtool inspect lists"
            )
        known = one.resolved(family)
        if not known.plain and not any(known.of(*key) for key in adapter.patches):
            raise UsageProblem("these strengths leave nothing of an input")
