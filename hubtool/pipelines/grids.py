"""Several pictures as one, with words at the edges: a comparison of strengths, adapters and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hubtool.errors import UsageProblem

_GAP = 4
_PADDING = 6
_PAPER, _INK = "white", "black"


def joined(cells: Sequence[Sequence[Any]], rows: Sequence[str], columns: Sequence[str]) -> Any:
    """One picture of ``cells`` (rows of PIL pictures of one size), a label at each row and above each column.

    Labels that are too long are cut in the middle. Raises ``UsageProblem`` for an empty grid or one whose rows differ in length.
    """
    if not cells or any(len(row) != len(columns) for row in cells) or len(cells) != len(rows):
        raise UsageProblem("a grid needs as many labels as rows and columns")
    from PIL import Image, ImageDraw

    width, height = cells[0][0].size
    font = _font(max(10, min(28, height // 20)))
    left = min(max(round(font.getlength(label)) for label in rows), width) + 2 * _PADDING
    line = sum(font.getmetrics()) + 2 * _PADDING
    size = (left + len(columns) * (width + _GAP), line + len(rows) * (height + _GAP))
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, label in enumerate(columns):
        at = left + i * (width + _GAP) + width / 2
        pen.text((at, line / 2), fitted(label, font, width), _INK, font, anchor="mm")
    for j, (label, row) in enumerate(zip(rows, cells, strict=True)):
        top = line + j * (height + _GAP)
        pen.text((left - _PADDING, top + height / 2), fitted(label, font, left - 2 * _PADDING), _INK, font, anchor="rm")
        for i, cell in enumerate(row):
            sheet.paste(cell, (left + i * (width + _GAP), top))
    return sheet


def fitted(label: str, font: Any, width: float) -> str:
    """``label``, cut to ``width`` pixels in its middle: names of files differ most often at the end, and the seed stands there."""
    kept = len(label)
    while kept and font.getlength(_cut(label, kept)) > width:
        kept -= 1
    return _cut(label, kept)


def _cut(label: str, kept: int) -> str:
    """So many of its letters, the larger half from the start."""
    return label if kept >= len(label) else f"{label[: kept - kept // 2]}...{label[len(label) - kept // 2 :]}"


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
