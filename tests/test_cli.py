"""The command line as a whole: global options, endings, what is printed where."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from hubtool import __version__, errors
from hubtool.cli import output
from hubtool.cli.amounts import human_size
from hubtool.cli.context import FORMATS, State, format_option, pass_state
from hubtool.cli.errors import EXIT_CODES, describe, wants_json
from hubtool.cli.main import _COMMANDS, cli

HOSTILE = "a\x1b[31m\u202eb\x07\x9b"


def hubtool(*args: str) -> Result:
    return CliRunner().invoke(cli, args, prog_name="hubtool")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A command named ``fail`` that raises what it is given."""
    raised: list[BaseException] = []

    @click.command()
    @click.option("--json", "as_json", is_flag=True)
    def fail(as_json: bool) -> None:
        raise raised[0]

    monkeypatch.setattr(type(cli), "get_command", lambda self, ctx, name: fail)
    monkeypatch.setattr(type(cli), "resolve_command", lambda self, ctx, args: ("fail", fail, args[1:]))

    def run(error: BaseException, *args: str) -> Result:
        raised[:] = [error]
        return hubtool("fail", *args)

    return run


class TestHelp:
    def test_lists_every_command_file_with_its_first_docstring_line(self) -> None:
        shown = " ".join(hubtool("--help").stdout.split())
        for path in _COMMANDS.glob("[a-z]*.py"):
            first = path.read_text("utf-8").split("\n")[0].strip('"').rstrip(".")
            assert f"{path.stem.rstrip('_').replace('_', '-')} {first}" in shown

    @pytest.mark.parametrize("path", sorted(_COMMANDS.glob("[a-z]*.py")), ids=lambda path: path.stem)
    def test_every_command_has_a_help_page(self, path: Path) -> None:
        result = hubtool(path.stem.rstrip("_").replace("_", "-"), "--help")
        assert result.exit_code == 0
        assert result.stdout.startswith("Usage: hubtool ")

    @pytest.mark.parametrize("path", sorted(_COMMANDS.glob("[a-z]*.py")), ids=lambda path: path.stem)
    def test_every_option_has_help(self, path: Path) -> None:
        command = cli.get_command(click.Context(cli), path.stem.rstrip("_").replace("_", "-"))
        commands = [command, *getattr(command, "commands", {}).values()]
        silent = [
            option.name
            for one in commands
            if one
            for option in one.params
            if isinstance(option, click.Option) and not option.help
        ]
        assert not silent

    def test_without_a_command_shows_help_and_counts_as_usage(self) -> None:
        result = hubtool()
        assert result.exit_code == 2
        assert "Commands:" in result.stderr

    def test_names_every_exit_code(self) -> None:
        shown = hubtool("--help").stdout
        assert all(f"{code} " in shown for code in EXIT_CODES)


class TestUsage:
    def test_an_unknown_command_suggests_the_nearest(self) -> None:
        result = hubtool("inspct", "x")
        assert result.exit_code == 2
        assert "did you mean inspect?" in result.stderr
        assert result.stdout == ""

    def test_an_unknown_option_is_a_usage_error_with_a_hint(self) -> None:
        result = hubtool("version", "--nonsense")
        assert result.exit_code == 2
        assert "hint: hubtool version --help" in result.stderr

    def test_a_usage_error_with_json_is_json(self) -> None:
        result = hubtool("version", "--json", "--nonsense")
        assert result.exit_code == 2
        assert json.loads(result.stdout)["error"]["code"] == "usage"

    @pytest.mark.parametrize(
        ("args", "expected"),
        [
            (["ls", "--json"], True),
            (["ls", "--format", "json"], True),
            (["ls", "--format=json"], True),
            (["ls", "--format", "csv"], False),
            (["ls", "--", "--json"], False),
            ([], False),
        ],
    )
    def test_json_is_asked_for_before_the_end_of_options(self, args: list[str], expected: bool) -> None:
        assert wants_json(args) is expected


class TestEndings:
    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (errors.HubtoolError("x"), 1),
            (errors.UsageProblem("x"), 2),
            (errors.PartialFailure("x"), 3),
            (errors.LibraryLocked("x"), 5),
            (errors.HubError("x"), 6),
            (errors.CorruptFile("x"), 7),
            (errors.UnsafeFile("x"), 7),
            (KeyboardInterrupt(), 130),
            (click.Abort(), 1),
            (PermissionError(13, "Permission denied", "f"), 1),
            (MemoryError(), 1),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_every_ending_has_its_exit_code_and_a_message(self, failing: Any, error: BaseException, code: int) -> None:
        result = failing(error)
        assert result.exit_code == code
        assert result.stderr.strip()
        assert "Traceback" not in result.stderr

    def test_a_message_says_where_and_what_next(self, failing: Any) -> None:
        result = failing(
            errors.CorruptFile("the header ends early", path="a.safetensors", offset=8, hint="download it again")
        )
        assert result.stderr == "error: the header ends early (a.safetensors, offset 8)\nhint: download it again\n"

    def test_json_errors_carry_path_and_offset(self, failing: Any) -> None:
        result = failing(errors.CorruptFile("broken", path="a.pt", offset=3), "--json")
        assert json.loads(result.stdout) == {
            "error": {"code": "corrupt", "message": "broken", "path": "a.pt", "offset": 3}
        }

    def test_a_partial_failure_adds_no_second_document(self, failing: Any) -> None:
        assert failing(errors.PartialFailure("2 of 3 failed"), "--json").stdout == ""

    def test_hostile_text_in_an_error_is_escaped(self, failing: Any) -> None:
        shown = failing(errors.CorruptFile(HOSTILE, path=HOSTILE), "--json")
        for text in (shown.stdout, shown.stderr):
            assert not set("\x1b\u202e\x07\x9b") & set(text)

    def test_a_bug_keeps_its_traceback(self, failing: Any) -> None:
        result = failing(ZeroDivisionError("a bug"))
        assert isinstance(result.exception, ZeroDivisionError)

    def test_the_place_is_not_repeated_when_the_message_has_it(self) -> None:
        assert describe(errors.FileMissing("no such file: a.pt", path="a.pt")) == "no such file: a.pt"

    def test_sigterm_unwinds_and_exits_143(self) -> None:
        code = (
            "import time; from hubtool.cli import main as m\n"
            "def run(**kw):\n"
            "    try: print('ready', flush=True); time.sleep(30)\n"
            "    finally: print('unwound', flush=True)\n"
            "m.cli.main = run; m.main()"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGTERM)
            assert process.stdout.read() == "unwound\n"
        assert process.returncode == 143

    def test_a_closed_pipe_ends_quietly(self) -> None:
        with subprocess.Popen(
            [sys.executable, "-m", "hubtool", "version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout
            assert process.stderr
            process.stdout.close()
            assert process.stderr.read() == ""


class TestGlobalOptions:
    def test_the_state_reaches_commands(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []

        @click.command()
        @pass_state
        def look(state: State) -> None:
            seen.append(state)

        monkeypatch.setattr(type(cli), "resolve_command", lambda self, ctx, args: ("look", look, args[1:]))
        assert hubtool("--library", "x.sqlite3", "-q", "-vv", "look").exit_code == 0
        assert seen == [State("x.sqlite3", quiet=True, verbose=2)]

    def test_quiet_silences_talk_but_not_complaints(self, monkeypatch: pytest.MonkeyPatch) -> None:
        @click.command()
        def talk() -> None:
            output.say("talk")
            output.complain("complaint")

        monkeypatch.setattr(type(cli), "resolve_command", lambda self, ctx, args: ("talk", talk, args[1:]))
        assert hubtool("talk").stderr == "talk\ncomplaint\n"
        assert hubtool("-q", "talk").stderr == "complaint\n"

    def test_version_prints_one_line(self) -> None:
        assert hubtool("--version").stdout == f"hubtool {__version__}\n"


class TestListing:
    ROWS = (
        {"path": "a b.pt", "size": 1_500_000, "tags": ["x", "y"], "rank": None},
        {"path": "=cmd()", "size": 3, "tags": [], "rank": 4},
    )
    COLUMNS = ("path", "size", "tags")

    def printed(self, capsys: pytest.CaptureFixture[str], fmt: str, rows: Any = ROWS) -> str:
        output.listing(rows, self.COLUMNS, fmt)
        return capsys.readouterr().out

    def test_json_is_one_document_with_whole_rows(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert json.loads(self.printed(capsys, "json")) == list(self.ROWS)

    def test_ndjson_is_a_document_per_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert [json.loads(line) for line in self.printed(capsys, "ndjson").splitlines()] == list(self.ROWS)

    def test_csv_has_bytes_as_integers_and_no_live_formula(self, capsys: pytest.CaptureFixture[str]) -> None:
        rows = list(csv.DictReader(io.StringIO(self.printed(capsys, "csv"))))
        assert rows[0] == {"path": "a b.pt", "size": "1500000", "tags": "x, y"}
        assert rows[1]["path"] == "'=cmd()"

    def test_paths_are_only_paths(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.printed(capsys, "paths") == "a b.pt\n=cmd()\n"

    def test_a_table_aligns_and_shows_sizes_for_people(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.printed(capsys, "table") == "path      size  tags\na b.pt  1.5 MB  x, y\n=cmd()     3 B\n"

    @pytest.mark.parametrize("fmt", FORMATS)
    def test_no_rows_print_nothing_that_is_not_the_format(self, capsys: pytest.CaptureFixture[str], fmt: str) -> None:
        expected = {"json": "[]\n", "csv": "path,size,tags\n"}
        assert self.printed(capsys, fmt, []) == expected.get(fmt, "")

    @pytest.mark.parametrize("fmt", ["table", "csv", "json", "ndjson"])
    def test_hostile_text_is_escaped(self, capsys: pytest.CaptureFixture[str], fmt: str) -> None:
        shown = self.printed(capsys, fmt, [{"path": HOSTILE, "size": 1, "tags": [HOSTILE]}])
        assert not set("\x1b\u202e\x07\x9b") & set(shown)

    def test_paths_in_a_pipe_keep_their_bytes(self, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
        output.listing([{"path": os.fsdecode(b"caf\xe9.pt")}], ("path",), "paths")
        assert capfdbinary.readouterr().out == b"caf\xe9.pt\n"

    def test_format_option_takes_json_for_short(self) -> None:
        @click.command()
        @format_option
        def show(fmt: str) -> None:
            click.echo(fmt)

        assert [CliRunner().invoke(show, args).output for args in ([], ["--json"], ["--format", "csv"])] == [
            "table\n",
            "json\n",
            "csv\n",
        ]


class TestText:
    def test_json_escapes_keep_their_value(self) -> None:
        document = {"text": HOSTILE + "é日本\n", "path": os.fsdecode(b"caf\xe9")}
        text = output.to_json(document)
        assert json.loads(text) == document
        assert "é日本" in text

    def test_json_has_no_nan(self) -> None:
        assert json.loads(output.to_json({"a": [float("nan"), float("inf"), 1.5]})) == {"a": [None, None, 1.5]}

    def test_json_writes_times_in_utc_and_paths_as_text(self) -> None:
        document = {"at": datetime(2026, 11, 21, 12, 30, tzinfo=UTC), "path": Path("a/b"), "tags": {"b", "a"}}
        assert json.loads(output.to_json(document)) == {"at": "2026-11-21T12:30:00Z", "path": "a/b", "tags": ["a", "b"]}

    @pytest.mark.parametrize(
        ("count", "text"),
        [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_130_000_000, "2.1 GB"), (5 * 10**15, "5000.0 TB")],
    )
    def test_sizes_for_people(self, count: int, text: str) -> None:
        assert human_size(count) == text

    def test_long_cells_keep_both_ends(self, capsys: pytest.CaptureFixture[str]) -> None:
        output.listing([{"path": "start" + "x" * 90 + "end.safetensors"}], ("path",), "table")
        cell = capsys.readouterr().out.splitlines()[1]
        assert len(cell) == 60
        assert cell.startswith("startx")
        assert cell.endswith("end.safetensors")

    def test_progress_draws_nothing_where_nobody_looks(self, capsys: pytest.CaptureFixture[str]) -> None:
        with output.progress("hashing", total=3) as advance:
            advance()
            advance(2)
        assert capsys.readouterr() == ("", "")


class TestMachinery:
    def test_version_knows_what_is_installed_without_importing_it(self) -> None:
        document = json.loads(hubtool("version", "--json").stdout)
        assert document["hubtool"] == __version__
        assert document["packages"]["click"]

    def test_config_path_follows_the_option_then_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HUBTOOL_LIBRARY", "from-env.sqlite3")
        assert hubtool("config", "path").stdout == "from-env.sqlite3\n"
        assert hubtool("--library", "given.sqlite3", "config", "path").stdout == "given.sqlite3\n"
        monkeypatch.delenv("HUBTOOL_LIBRARY")
        assert hubtool("config", "path").stdout.endswith("library.sqlite3\n")

    def test_config_hides_a_password(self) -> None:
        shown = hubtool("--library", "postgresql+psycopg://ann:secret@db/x", "config", "list", "--json").stdout
        assert json.loads(shown)["library"] == "postgresql+psycopg://ann:***@db/x"
        assert "secret" not in shown

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_completion_prints_a_script(self, shell: str) -> None:
        assert "_HUBTOOL_COMPLETE" in hubtool("completion", shell).stdout

    def test_completion_completes_commands(self, monkeypatch: pytest.MonkeyPatch) -> None:
        environment = {
            **os.environ,
            "_HUBTOOL_COMPLETE": "bash_complete",
            "COMP_WORDS": "hubtool insp",
            "COMP_CWORD": "1",
        }
        script = "from hubtool.cli.main import main; main()"
        ended = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        assert ended.stdout.split() == ["plain,inspect"]
