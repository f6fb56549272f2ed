"""How hubtool came to its conclusions about a file: the axes with evidence, what decides the family, claims against findings, hosts, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from hubtool.actions.inspect import Report, inspect
from hubtool.layouts.unwrap import unwrapped

if TYPE_CHECKING:
    from hubtool.layouts.axes import Axis
    from hubtool.layouts.family_evidence import Evidence
    from hubtool.layouts.hosts import Verdict
    from hubtool.layouts.parse import Parsed

_FIELDS = (
    "path", "format", "kind", "kind_candidates", "variant", "algorithm", "flags", "family", "family_candidates", "base_model",
    "layout", "components", "ranks", "alphas", "evidence", "claims", "findings",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Check:
    """One fact that metadata claim and tensors show. ``agrees``: None where they cannot be compared."""

    what: str
    claimed: str
    found: str
    agrees: bool | None

    def to_json(self) -> dict[str, Any]:
        return {"what": self.what, "claimed": self.claimed, "found": self.found, "agrees": self.agrees}


@dataclass(frozen=True, slots=True)
class Next:
    """A command worth running, and why."""

    command: str
    why: str

    def to_json(self) -> dict[str, str]:
        return {"command": self.command, "why": self.why}


@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything ``explain`` prints. Axes, family evidence and hosts are empty for what is no readable adapter."""

    report: Report
    axes: tuple[Axis, ...]
    family: Evidence | None
    checks: tuple[Check, ...]
    hosts: tuple[Verdict, ...]
    next: tuple[Next, ...]

    def to_json(self) -> dict[str, Any]:
        document = self.report.to_json()
        return {
            **{name: document[name] for name in _FIELDS},
            "axes": [axis.to_json() for axis in self.axes],
            "family_evidence": None if self.family is None else self.family.to_json(),
            "claims_checked": [check.to_json() for check in self.checks],
            "hosts": [verdict.to_json() for verdict in self.hosts],
            "next": [step.to_json() for step in self.next],
        }


def explain(path: str | Path) -> Explanation:
    """Explain the file or folder at ``path``. Raises what ``inspect`` raises; needs no torch."""
    from hubtool.layouts.parse import recognise

    report = inspect(path, hashes=False)
    checks = tuple(_checks(report))
    parsed = recognise(report.file) if report.identity.kind == "lora" else None
    if parsed is None or not parsed.adapter.patches:
        return Explanation(report, (), None, checks, (), tuple(_mending(report)))
    from hubtool.layouts.axes import axes
    from hubtool.layouts.family_evidence import evidence
    from hubtool.layouts.hosts import verdicts

    verdict = verdicts(parsed, single=report.file.format != "peft-folder")
    steps = (*_mending(report), *_settling(report, parsed), *_remedies(report, parsed, verdict))
    return Explanation(report, axes(report.file, parsed), evidence(parsed), checks, verdict, steps)


def _checks(report: Report) -> Iterator[Check]:
    claims, found = report.identity.claims, report.identity
    if claims.get("family"):
        from hubtool.layouts.claims import related

        families = (found.family,) if found.family else found.family_candidates
        agrees = any(related(claims["family"], name) for name in families) if families else None
        yield Check("family", str(claims["family"]), " or ".join(families) or "unknown", agrees)
    yield from _number(claims.get("network_dim"), "rank", found.ranks)
    yield from _number(claims.get("network_alpha"), "alpha", found.alphas)
    arguments = claims.get("network_args")
    named = arguments.get("algo") if isinstance(arguments, dict) else None
    if isinstance(named, str) and found.algorithm:
        yield Check(
            "algorithm", named, found.algorithm, named.lower() in (found.algorithm, *_SYNONYMS.get(found.algorithm, ()))
        )


_SYNONYMS = {"locon": ("lora",), "lora": ("locon",), "oft": ("diag-oft",)}
_MOST = 6


def _number(claimed: Any, what: str, found: tuple[float, ...]) -> Iterator[Check]:
    if isinstance(claimed, int | float):
        told = ", ".join(f"{value:g}" for value in found[:_MOST]) + (" ..." if len(found) > _MOST else "")
        yield Check(what, f"{claimed:g}", told or "none", claimed in found if found else None)


def _mending(report: Report) -> Iterator[Next]:
    """The repair, for keys that were broken by hand."""
    from hubtool.layouts.repair import propose

    if any(finding.code == "broken-keys" for finding in report.identity.findings):
        found = propose(unwrapped(report.file)[0], report.file.path)
        known = f"{found.resolved} of {found.total} keys then name known modules" if found else ""
        yield Next(f"{_convert(report)} --repair", f"mends the keys that were broken by hand; {known}")


def _settling(report: Report, parsed: Parsed) -> Iterator[Next]:
    """The choice a person can make where the file cannot tell its family."""
    if parsed.adapter.family is None and parsed.candidates:
        names = "|".join(parsed.candidates)
        yield Next(
            f"{_convert(report)} --layout LAYOUT --family {names}", "the file cannot tell its family: you may know it"
        )


def _convert(report: Report) -> str:
    return f"hubtool convert {quote(str(report.file.path))} -o OUT"


def _remedies(report: Report, parsed: Parsed, verdicts: tuple[Verdict, ...]) -> Iterator[Next]:
    """Conversions after which hosts read the file that do not, or not wholly, read it now: each host is promised once."""
    from hubtool.actions.remedies import remedies

    for remedy in remedies(parsed, verdicts):
        extra = " --as lora" if remedy.as_lora else ""
        why = f"then read by {', '.join(host.title for host in remedy.hosts)}"
        why += f", ranks grow to {remedy.rank} at most" if remedy.rank else ""
        yield Next(f"{_convert(report)} --layout {remedy.layout}{extra}", why)
