"""The token in use: searched for in everything that is written, said or sent elsewhere, whatever goes wrong on the way."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest
from click.testing import CliRunner

from hubtool.cli.main import cli
from hubtool.hub import retrying
from tests.support import publishing
from tests.support.linking import rescan
from tests.support.pulling import CARD, CONTENT

if TYPE_CHECKING:
    from tests.support.hub import LocalHub  # pytest_plugins imports it first

pytest_plugins = ["tests.support.hub"]

SENTINEL = "hf_" + "Sentinel7" * 4
REPO = "tester/style"
ECHO = {"error": f"token {SENTINEL} of Bearer {SENTINEL} is not welcome"}  # a server that repeats what it was sent
FAULTS: dict[str, dict[str, Any]] = {
    "none": {"times": 0},
    "500": {"kind": "status", "status": 500, "json": ECHO},
    "401": {"kind": "status", "status": 401, "json": ECHO},
    "403": {"kind": "status", "status": 403, "json": ECHO},
    "400": {"kind": "status", "status": 400, "json": ECHO},
    "reset": {"kind": "reset"},
    "truncate": {"kind": "truncate", "fraction": 0.5},
    "html": {"kind": "html"},
    "corrupt": {"kind": "corrupt"},
}


class Elsewhere:
    """Another origin, which remembers the headers of whatever reaches it."""

    def __init__(self) -> None:
        seen: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                seen.append(str(self.headers))
                self.send_error(404)

            do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self.seen = seen
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    other = Elsewhere()
    yield other
    other.server.shutdown()
    other.server.server_close()


@pytest.fixture
def armed(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    """A hub with a file, the same file in the library and published, and the sentinel as the token in use."""
    (tmp_path / "models").mkdir()
    path = publishing.lora(tmp_path / "models")
    far = publishing.lora(tmp_path, "far.safetensors", 5).rename(tmp_path / "far.bytes").read_bytes()
    hub.upload("tester/far", {"far.safetensors": far, "README.md": CARD.encode()})
    hub.upload("tester/near", {"style.safetensors": path.read_bytes()})
    rescan(path.parent)
    hub.tokens[SENTINEL] = {"user": "tester", "role": "write"}
    monkeypatch.setenv("HF_TOKEN", SENTINEL)
    monkeypatch.setattr(retrying, "_LONGEST_WAIT", 0.001)
    return hub


COMMANDS = {
    "publish": ["publish", "models/style.safetensors", REPO],
    "plan": ["publish", "models/style.safetensors", REPO, "--dry-run", "--json"],
    "pull": ["pull", "tester/far", "-o", "out"],
    "scan": ["scan", "hf://tester/far", "--refresh"],
    "inspect": ["inspect", "hf://tester/far/far.safetensors", "--json", "--refresh"],
    "link": ["link", "models/style.safetensors", "tester/near"],
    "outdated": ["outdated"],
    "sync": ["sync", "--pull", "--publish", "--json"],
    "card": ["card", "hf://tester/far"],
}


def said(command: list[str]) -> str:
    done = CliRunner().invoke(cli, ["-vv", *command])
    assert done.exception is None or isinstance(done.exception, SystemExit), (
        done.exception
    )  # nothing ends in a traceback
    return done.output + done.stderr


def written(hub: LocalHub, folder: Path) -> Iterator[tuple[str, bytes]]:
    from hubtool.actions.where import default_target
    from hubtool.hub.header_cache import cache_folder

    for root in (folder, Path(default_target()).parent, cache_folder()):
        for path in root.rglob("*"):
            if path.is_file() and "hub-data" not in path.parts:
                yield str(path), path.read_bytes()
    for (_, repo), found in hub.store.repos.items():
        for commit in found["commits"].values():
            for name, entry in commit["files"].items():
                yield f"{repo}/{name}", hub.store.read(entry)


@pytest.mark.parametrize("fault", FAULTS)
def test_no_command_says_or_writes_the_token_whatever_fails(
    armed: LocalHub, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.chdir(tmp_path)
    for name, command in COMMANDS.items():
        armed.clear()
        armed.fault(**{"kind": "status", "path": ".*", "times": 2, "skip": 1, **FAULTS[fault]})
        text = said(command)
        assert "No such option" not in text
        assert SENTINEL not in text, name
    assert SENTINEL not in caplog.text
    assert [place for place, data in written(armed, tmp_path) if SENTINEL.encode() in data] == []


@pytest.mark.parametrize(
    "path", ["/api/", "/resolve/", "/tree/", "/preupload/|/commit/|/lfs/", "xet-.*-token", CONTENT]
)
def test_a_redirect_to_another_origin_gets_no_token(
    armed: LocalHub, elsewhere: Elsewhere, tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS.values():
        armed.clear()
        for status in (302, 307, 308):
            armed.fault("status", path, status=status, headers={"Location": f"{elsewhere.url}/taken"})
        assert SENTINEL not in said(command)
    assert SENTINEL not in "".join(elsewhere.seen)
    assert elsewhere.seen or "xet" in path or "lfs" in path


@pytest.mark.parametrize("name", sorted({words[0] for words in COMMANDS.values()}))
def test_no_command_for_hubs_takes_a_token_as_an_argument(name: str) -> None:
    command = import_module(f"hubtool.cli.commands.{name}").command
    options = {text for param in command.params if isinstance(param, click.Option) for text in param.opts}
    assert not {"--token", "--hf-token", "--api-key", "--key", "--password"} & options


def test_the_token_is_in_no_command_line_while_files_come(armed: LocalHub, tmp_path: Path) -> None:
    armed.fault("slow", CONTENT, "GET", rate=1000, times=9)
    command = [sys.executable, "-m", "hubtool", "-vv", "pull", "tester/far", "-o", str(tmp_path / "out"), "--no-index"]
    with subprocess.Popen(
        command, env=armed.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        end = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < end and not armed.log(CONTENT, "GET"):
            lines = Path(f"/proc/{process.pid}/cmdline").read_bytes() if process.poll() is None else b""
            assert SENTINEL.encode() not in lines
            time.sleep(0.05)
        process.kill()
        assert process.stdout is not None
        assert SENTINEL.encode() not in process.stdout.read()


def test_a_hub_without_xet_is_pulled_from_over_http(armed: LocalHub, tmp_path: Path) -> None:
    armed.fault("status", "xet-read-token", status=404, times=99)
    done = armed.run("pull", "tester/far/far.safetensors", "-o", str(tmp_path / "out"), "--no-index")
    assert done.returncode == 0, done.stderr
    assert "downloaded" in done.stdout
    assert "downloaded (xet)" not in done.stdout
