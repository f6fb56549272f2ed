"""Pulling through every fault the server can make, over Xet and HTTP: nothing lost, nothing doubled, no wrong byte accepted."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hubtool.actions.library import open_store
from hubtool.actions.pull import pull
from hubtool.actions.pull_result import Options
from hubtool.errors import CorruptFile, HubError, NotFound
from hubtool.hub.client import Client
from tests.support.pulling import CARD, CONTENT, leftovers, lora, noise, run

if TYPE_CHECKING:
    from tests.support.hub import LocalHub  # pytest_plugins imports it first

pytest_plugins = ["tests.support.hub"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# --------------------------------------------------------------------------------------------- faults

Fault = Callable[[Any], Any]  # of a LocalHub
SURVIVED: dict[str, Fault] = {
    "status 500": lambda hub: hub.fault("status", CONTENT, "GET", status=500, times=2),
    "status 503 of the hub": lambda hub: hub.fault("status", "/resolve/|xet-read-token", "GET", status=503, times=2),
    "status 403 of the storage": lambda hub: hub.fault("status", CONTENT, "GET", status=403, times=1),
    "status of the listing": lambda hub: hub.fault("status", "/api/models/.*tree", "GET", status=502, times=2),
    "status of the info": lambda hub: hub.fault("status", "/api/models/tester/style", "GET", status=504, times=2),
    "reset": lambda hub: hub.fault("reset", CONTENT, "GET", times=2),
    "reset of the hub": lambda hub: hub.fault("reset", "/resolve/|xet-read-token|/tree/", "GET", times=2),
    "reset in the middle": lambda hub: hub.fault("truncate", CONTENT, "GET", fraction=0.5, reset=True, times=2),
    "truncate": lambda hub: hub.fault("truncate", CONTENT, "GET", fraction=0.4, times=3),
    "truncate at the first byte": lambda hub: hub.fault("truncate", CONTENT, "GET", bytes=0, times=2),
    "corrupt": lambda hub: hub.fault("corrupt", CONTENT, "GET", times=1),
    "short": lambda hub: hub.fault("short", CONTENT, "GET", bytes=1000, times=1),
    "slow": lambda hub: hub.fault("slow", CONTENT, "GET", rate=1_500_000, times=1),
    "delay": lambda hub: hub.fault("delay", CONTENT, "GET", seconds=0.2, times=1),
    "norange": lambda hub: [hub.fault("truncate", CONTENT, "GET", fraction=0.5), hub.fault("norange", CONTENT, "GET", times=9)],
    "gzip": lambda hub: hub.fault("gzip", "/get/", "GET", times=1),
    "lost_response": lambda hub: hub.fault("lost_response", ".*", times=3),
    "ratelimit of the hub": lambda hub: hub.fault("ratelimit", "/api/|/resolve/", "GET", reset=1, times=2),
    "ratelimit of the storage": lambda hub: hub.fault("ratelimit", CONTENT, "GET", reset=1, times=1),
    "set_headers": lambda hub: hub.fault("set_headers", "/get/", "GET", headers={"ETag": '"another"'}, times=2),
}  # fmt: skip


@pytest.mark.parametrize("name", SURVIVED)
def test_a_fault_is_survived(hub_both: LocalHub, out: Path, name: str) -> None:
    data = noise(3_000_000)
    hub_both.upload("tester/style", {"style.safetensors": data})
    hub_both.requests.clear()
    SURVIVED[name](hub_both)
    done = run(hub_both, "tester/style/style.safetensors", out, index=False)
    assert [item.error for item in done.items] == [None]
    assert (out / "style.safetensors").read_bytes() == data
    assert os.listdir(out) == ["style.safetensors"]


def test_race_a_commit_during_the_pull_does_not_mix_two_versions(hub: LocalHub, out: Path) -> None:
    first = {"a.safetensors": noise(1_000_000, 1), "b.safetensors": noise(1_000_000, 2)}
    commit = hub.put("tester/style", first)

    class Racing(Client):
        def tree(self, ref: Any) -> Any:
            found = super().tree(ref)
            hub.put("tester/style", {"a.safetensors": noise(1_000_000, 3), "b.safetensors": noise(1_000_000, 4)})
            return found

    done = pull(["tester/style"], Options(out, index=False), client=Racing(hub.url, sleep=lambda _: None))[0]
    assert done.commit == commit != hub.head("tester/style")
    assert {name: (out / name).read_bytes() for name in first} == first


LOST: dict[str, tuple[Fault, type[Exception]]] = {
    "corrupt for ever": (lambda hub: hub.fault("corrupt", CONTENT, "GET", times=99), CorruptFile),
    "status for ever": (lambda hub: hub.fault("status", CONTENT, "GET", status=500, times=99), HubError),
    "reset for ever": (lambda hub: hub.fault("reset", CONTENT, "GET", times=99), HubError),
    "a sign-in page": (lambda hub: hub.fault("html", "/resolve/|/xet|/get/", times=99), HubError),
    "another file": (lambda hub: hub.fault("status", "/resolve/|xet-read-token", status=200, body="x" * 5000, times=99), CorruptFile),
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_what_cannot_be_had_leaves_no_file(hub_both: LocalHub, out: Path, name: str) -> None:
    hub_both.upload("tester/style", {"a.safetensors": noise(3000)})
    fault, expected = LOST[name]
    fault(hub_both)
    done = run(hub_both, "tester/style/a.safetensors", out)
    assert isinstance(done.items[0].error, expected)
    assert not (out / "a.safetensors").exists()
    assert leftovers(out) == []
    with open_store() as store:
        assert not store.rows("SELECT 1 FROM location")


def test_a_file_that_fails_does_not_stop_the_others(hub: LocalHub, out: Path) -> None:
    hub.put("tester/style", {"a.safetensors": noise(1000, 1), "b.safetensors": noise(1000, 2)})
    digest = hashlib.sha256(noise(1000, 1)).hexdigest()
    hub.fault("corrupt", digest, times=99)
    done = run(hub, "tester/style", out, index=False)
    assert [item.how for item in done.items] == ["failed", "http"]
    assert os.listdir(out) == ["b.safetensors"]


# --------------------------------------------------------------------------------------------- doors


def test_a_gated_repository_is_explained(
    hub: LocalHub, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("acme2/gated", {"a.safetensors": lora()}, gated=True)
    from tests.support.hub import point

    done = run(hub, "acme2/gated/a.safetensors", out)
    assert "is gated" in str(done.items[0].error)
    assert f"{hub.url}/acme2/gated" in str(done.items[0].error.hint)
    point(monkeypatch, hub.url, hub.home, token=None)
    done = run(hub, "acme2/gated/a.safetensors", out)
    assert "no token was sent" in str(done.items[0].error)
    assert leftovers(out) == []


def test_a_private_repository_looks_like_a_missing_one(hub: LocalHub, out: Path) -> None:
    hub.put("other/secret", {"a.safetensors": lora()}, private=True)
    for repo in ("other/secret", "other/nothing"):
        with pytest.raises(HubError, match="does not exist, or is private") as caught:
            run(hub, repo, out)
        assert "hf auth login" in str(caught.value.hint)


def test_a_missing_file_and_a_missing_revision_are_named(hub: LocalHub, out: Path) -> None:
    hub.put("tester/style", {"a.safetensors": lora()})
    with pytest.raises(NotFound, match=r"no file b\.safetensors") as caught:
        run(hub, "tester/style/b.safetensors", out)
    assert "a.safetensors" in str(caught.value.hint)
    with pytest.raises(HubError, match="no revision v9"):
        run(hub, "tester/style@v9", out)


# --------------------------------------------------------------------------------------------- the command

SENTINEL = "hf_sentinelTOKENabcdefghijklmnop"


def test_the_command_tells_what_it_did_and_never_the_token(hub: LocalHub, out: Path, tmp_path: Path) -> None:
    hub.tokens[SENTINEL] = {"user": "tester", "role": "read"}
    hub.put("tester/style", {"a.safetensors": lora(), "README.md": CARD}, private=True)
    library = tmp_path / "library.sqlite3"
    args = ("--library", str(library), "-v", "pull", "hf://tester/style", "-o", str(out), "--json")
    done = hub.run(*args, HF_TOKEN=SENTINEL)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [file["how"] for file in document["files"]] == ["http", "http"]
    hub.fault("status", "/get/|/resolve/", status=403, times=99)
    (out / "a.safetensors").unlink()
    failed = hub.run(
        "--library", str(library), "pull", "hf://tester/style/a.safetensors", "-o", str(out / "new"), HF_TOKEN=SENTINEL
    )
    assert failed.returncode == 6
    texts = [done.stdout, done.stderr, failed.stdout, failed.stderr]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "hub-data" not in path.parts]
    assert not [text for text in texts if SENTINEL in text]
    assert not [data for data in written if SENTINEL.encode() in data]


def test_a_failing_file_of_many_is_exit_code_3(hub: LocalHub, out: Path) -> None:
    hub.put("tester/style", {"a.safetensors": noise(1000, 1), "b.safetensors": noise(1000, 2)})
    hub.fault("corrupt", hashlib.sha256(noise(1000, 1)).hexdigest(), times=99)
    done = hub.run("pull", "tester/style", "-o", str(out), "--no-index")
    assert done.returncode == 3
    assert "a.safetensors" in done.stderr


def test_a_pulled_lora_loads_by_name_in_the_library(hub: LocalHub, out: Path) -> None:
    hub.put("tester/style", {"a.safetensors": lora(), "README.md": CARD})
    assert hub.run("pull", "tester/style", "-o", str(out)).returncode == 0
    listed = json.loads(hub.run("ls", "trigger:sks", "--json").stdout)
    assert [row["name"] for row in listed] == ["a.safetensors"]
