"""Progress bars: amount, rate and time left, for bytes and for things one can count."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from hubtool.cli import bars, output
from hubtool.tensors.progress import Meter, expect


@pytest.mark.parametrize(
    ("done", "total", "speed", "text"),
    [
        (0, None, None, "0"),
        (3, 12, 0.5, "3 of 12, 0.5/s"),
        (40, None, 7.25, "40, 7.25/s"),
        (1_200_000_000, 2_100_000_000, 310e6, "1.2 GB of 2.1 GB, 310.0 MB/s"),
        (0, 5_000_000, None, "0 B of 5.0 MB"),
        (2_000_000, None, 1e6, "2.0 MB, 1.0 MB/s"),
    ],
)
def test_the_amount_says_what_is_known(done: float, total: float | None, speed: float | None, text: str) -> None:
    assert bars.amount(done, total, speed) == text


def drawn(total: int | None, *steps: int, announced: int = 0, description: str = "merging") -> str:
    """What a terminal was sent, without its control sequences."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    with bars.drawn(description, total, console) as bar:
        if announced:
            expect(bar, announced)
        for step in steps:
            bar(step)
        bar._bars.refresh()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())


def test_a_bar_shows_description_amount_and_time_left() -> None:
    shown = drawn(4_000_000, 1_000_000, 1_000_000)
    assert "merging" in shown
    assert "2.0 MB of 4.0 MB" in shown
    assert "left" in shown


def test_a_total_that_the_writer_announces_counts() -> None:
    assert "1.0 MB of 8.0 MB" in drawn(None, 1_000_000, announced=8_000_000)


def test_a_total_that_the_caller_knew_is_not_added_to() -> None:
    assert "1.0 MB of 4.0 MB" in drawn(4_000_000, 1_000_000, announced=8_000_000)


def test_without_a_total_the_time_that_passed_is_shown() -> None:
    shown = drawn(None, 3)
    assert "left" not in shown
    assert "0:00:0" in shown


def test_the_name_of_a_file_is_no_markup() -> None:
    assert "[red]x[/red]" in drawn(None, 1, description="merging [red]x[/red]")


def test_a_plain_function_may_be_told_what_to_expect() -> None:
    told: list[int] = []
    expect(told.append, 5)
    expect(None, 5)
    assert told == []


def test_the_commands_bar_takes_announcements_where_one_is_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with output.progress("converting") as advance:
        assert isinstance(advance, Meter)
        expect(advance, 10)
        advance(10)
    assert capsys.readouterr().out == ""


def test_items_have_a_rate_too() -> None:
    assert re.search(r"of 9(, [\d.e+]+/s)?", drawn(9, 1, 1, 1))
