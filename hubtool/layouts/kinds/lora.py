"""Adapters of every algorithm: whatever a syntax table explains."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from shlex import quote

from hubtool.adapters.identity import Identity
from hubtool.adapters.ir import Adapter
from hubtool.formats.base import TensorFile
from hubtool.layouts import tables
from hubtool.layouts.outline import RAW
from hubtool.layouts.parse import Parsed
from hubtool.layouts.parse import recognise as parse
from hubtool.layouts.repair import Repair, propose
from hubtool.layouts.unwrap import unwrapped
from hubtool.types import Finding, Severity

ORDER = 40
_CHECKPOINT = re.compile(r"(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.")


def recognise(file: TensorFile) -> Identity | None:
    """An adapter, or one so broken that only its repair can be named; None for anything else. Raises ``CorruptFile``."""
    parsed = parse(file)
    if parsed is None:
        return _broken(file) or _foreign_peft(file)
    adapter = parsed.adapter
    if not adapter.patches:
        return None
    return Identity(
        kind="lora",
        algorithm=_algorithm(adapter),
        family=adapter.family,
        family_candidates=parsed.candidates,
        base_model=None if adapter.family is None else tables.family(adapter.family).base_model,
        layout=str(parsed.layout),
        variant=parsed.syntax.id,
        components=adapter.components(),
        ranks=tuple(sorted({patch.rank for patch in adapter.patches.values() if patch.rank})),
        alphas=tuple(sorted({p.alpha_value for p in adapter.patches.values() if p.alpha_value is not None})),
        flags=("dora",) if any(patch.dora_scale is not None for patch in adapter.patches.values()) else (),
        embeddings=adapter.embeddings,
        findings=tuple(_findings(file, parsed)),
        evidence=tuple(_evidence(parsed)),
    )


def _algorithm(adapter: Adapter) -> str:
    """What most modules are; one convolution makes a LoRA a LoCon; norms and biases beside it do not count."""
    count = Counter(patch.algorithm for patch in adapter.patches.values())
    main = [name for name, _ in count.most_common() if name not in ("norm", "full", "set")] or list(count)
    return "locon" if main[0] == "lora" and "locon" in count else main[0]


def _evidence(parsed: Parsed) -> Iterator[str]:
    yield f"{_are(len(parsed.keys))} spelled as {parsed.syntax.title}"
    yield from parsed.evidence
    count = Counter(patch.algorithm for patch in parsed.adapter.patches.values())
    yield "modules by algorithm: " + ", ".join(f"{name} {n}" for name, n in count.most_common())


def _findings(file: TensorFile, parsed: Parsed) -> Iterable[Finding]:
    yield from parsed.adapter.findings
    if len(parsed.candidates) > 1:
        names = ", ".join(parsed.candidates)
        yield Finding("family-ambiguous", "info", f"names and shapes fit {names} alike")
    mixed = [key for key in parsed.adapter.extras if _CHECKPOINT.match(key)]
    if mixed:
        yield Finding("mixed-checkpoint", "warning", f"{_are(len(mixed))} a checkpoint's, first {mixed[0]}")
    yield from _claimed_rank(file, parsed)
    yield from _partly_broken(file, parsed)


def _are(count: int) -> str:
    return "1 tensor is" if count == 1 else f"{count} tensors are"


def _claimed_rank(file: TensorFile, parsed: Parsed) -> Iterable[Finding]:
    claim = file.metadata.get("ss_network_dim", "")
    ranks = {patch.rank for patch in parsed.adapter.patches.values()}
    if claim.isdecimal() and int(claim[:9]) not in ranks and ranks != {None}:
        text = (
            f"metadata claims rank {claim[:9]}, the tensors have {', '.join(map(str, sorted(r for r in ranks if r)))}"
        )
        yield Finding("claim-contradicts", "warning", text)


def _broken(file: TensorFile) -> Identity | None:
    """Keys that mean nothing as they are, and that a known repair makes mean something."""
    tensors, _ = unwrapped(file)
    found = propose(tensors, file.path)
    if found is None:
        return None
    return Identity(
        kind="lora",
        algorithm="lora",
        family=found.candidates[0] if len(found.candidates) == 1 else None,
        family_candidates=found.candidates,
        variant="broken",
        findings=(_repairable(file, found),),
        evidence=(found.sentence(),),
    )


def _repairable(file: TensorFile, found: Repair) -> Finding:
    severity: Severity = "error" if len(found.renames) == found.total else "warning"
    command = f"hubtool convert {quote(str(file.path))} -o OUT --repair"
    return Finding("broken-keys", severity, f"{found.sentence()}; mend them with: {command}")


def _partly_broken(file: TensorFile, parsed: Parsed) -> Iterator[Finding]:
    """Some keys are understood and others would be, if they were not broken."""
    unexplained = {"unknown-keys", "unknown-module"} & {finding.code for finding in parsed.adapter.findings}
    if unexplained or parsed.layout.naming == RAW:
        found = propose(unwrapped(file)[0], file.path)
        if found is not None:
            yield _repairable(file, found)


def _foreign_peft(file: TensorFile) -> Identity | None:
    """A PEFT folder whose method no syntax reads: still an adapter, told by its configuration."""
    config = file.config.get("adapter_config.json")
    if file.format != "peft-folder" or not isinstance(config, dict):
        return None
    method = str(config.get("peft_type", "unknown")).lower()
    return Identity(
        kind="lora" if method == "lora" else "unknown",
        algorithm=method,
        variant="peft-folder",
        findings=(
            Finding("peft-method", "info", f"a PEFT adapter of type {method}; its tensors are kept, not understood"),
        ),
        evidence=(f"adapter_config.json names peft_type {method}",),
    )
