"""An adapter at other ranks: the best that these ranks allow, by QR of its own factors; no product is ever formed.

Tucker cores and convolutions included; a LoHa or LoKr becomes the LoRA nearest to it. DoRA magnitudes stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

from hubtool.errors import ConversionError, UsageProblem
from hubtool.formats.base import TensorFile
from hubtool.ops import merge_adapters
from hubtool.ops.factor_space.budget import Budget
from hubtool.ops.factor_space.report import Report
from hubtool.ops.merge_adapters import Request, Source
from hubtool.ops.plan import Plan

_COMMENT = "ss_training_comment"


def plan(file: TensorFile, request: Request) -> tuple[Plan, Report]:
    """What resizing ``file`` to ``request.budget`` will write. Raises ``UsageProblem`` without a budget, ``ConversionError`` where no module
    would become smaller."""
    if request.budget == Budget():
        raise UsageProblem("resize to what?", hint="--rank, --energy, --error or --budget")
    made, report = merge_adapters.plan([Source(file)], request)
    if not any(one.how != "copied" for one in report.modules.values()) and not report.dropped:
        text = "no module has more ranks than that: there is nothing to resize"
        raise ConversionError(text, path=file.path, hint=f"hubtool inspect {file.path} lists its ranks")
    return _commented(made, file, report), report


def _commented(made: Plan, file: TensorFile, report: Report) -> Plan:
    """With a line in the training comment, as sd-scripts' resize_lora.py leaves one."""
    if _COMMENT not in file.metadata or _COMMENT not in made.metadata:
        return made
    before = sorted({rank for one in report.modules.values() for rank in one.ranks})
    after = sorted({one.rank for one in report.modules.values() if one.rank is not None})
    line = f"ranks {_span(before)} resized to {_span(after)}"
    old = file.metadata[_COMMENT]
    comment = line if old in ("", "None") else f"{line}; {old}"
    return replace(made, metadata={**made.metadata, _COMMENT: comment})


def _span(ranks: list[int]) -> str:
    if not ranks:
        return "-"
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
