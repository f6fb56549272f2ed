"""Several pictures as one: the labels tell them apart, and every cell keeps its pixels."""

from __future__ import annotations

from typing import Any

import pytest

from hubtool.errors import UsageProblem
from hubtool.pipelines import grids

Image = pytest.importorskip("PIL.Image")


class Fixed:
    """A font whose letters are ten pixels wide."""

    @staticmethod
    def getlength(text: str) -> int:
        return 10 * len(text)


@pytest.mark.parametrize(
    ("label", "width", "expected"),
    [
        ("style", 50, "style"),
        ("style-000010, seed 1", 150, "style-...seed 1"),
        ("style-000010", 100, "styl...010"),
        ("style-000020", 100, "styl...020"),
        ("style", 30, "..."),
        ("style", 0, "..."),
        ("", 0, ""),
    ],
)
def test_a_long_label_keeps_its_start_and_its_end(label: str, width: int, expected: str) -> None:
    assert grids.fitted(label, Fixed(), width) == expected


@pytest.mark.parametrize("label", ["a", "a label that is much longer than a picture is wide, seed 12"])
def test_every_cell_keeps_its_pixels_beside_labels_of_any_length(label: str) -> None:
    colours = [["red", "green", "blue"], ["yellow", "magenta", "cyan"]]
    cells = [[Image.new("RGB", (64, 48), colour) for colour in row] for row in colours]
    sheet = grids.joined(cells, [label, "b"], ["0", label, "1"])
    boxes = {
        colour: _box(sheet, cell.getpixel((0, 0)))
        for row, own in zip(colours, cells, strict=True)
        for colour, cell in zip(row, own, strict=True)
    }
    assert all((right - left, bottom - top) == (64, 48) for left, top, right, bottom in boxes.values())
    assert boxes["red"][0] == boxes["yellow"][0] < boxes["green"][0] < boxes["blue"][0]
    assert boxes["red"][1] == boxes["blue"][1] < boxes["yellow"][1]
    assert sheet.width < 64 + 3 * 64 + 60


def _box(sheet: Any, colour: Any) -> Any:
    """The smallest box around all pixels of one colour."""
    from PIL import ImageChops

    difference = ImageChops.difference(sheet, Image.new("RGB", sheet.size, colour)).convert("L")
    return difference.point(lambda value: 255 * (value == 0)).getbbox()


@pytest.mark.parametrize(("rows", "columns"), [([], []), (["a"], ["b", "c"]), (["a", "b"], ["c"])])
def test_labels_must_be_as_many_as_pictures(rows: list[str], columns: list[str]) -> None:
    with pytest.raises(UsageProblem, match="as many labels"):
        grids.joined([[Image.new("RGB", (8, 8))]] if rows else [], rows, columns)
