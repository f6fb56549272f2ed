"""Every fault of the server at every request of a publication and of a pull, over LFS and Xet: nothing lost, nothing doubled, nothing wrong kept."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hubtool.actions.publish import publish
from hubtool.actions.publish_facts import Said
from hubtool.actions.publish_result import Options, Result
from hubtool.hub.client import Client
from tests.support.publishing import lora
from tests.support.pulling import noise, run

if TYPE_CHECKING:
    from tests.support.hub import LocalHub  # pytest_plugins imports it first

pytest_plugins = ["tests.support.hub"]
pytestmark = pytest.mark.slow

REPO = "tester/style"
KINDS: dict[str, dict[str, Any]] = {
    "status": {"status": 503}, "reset": {}, "truncate": {"fraction": 0.5}, "corrupt": {}, "short": {"bytes": 3}, "lost_response": {},
}  # fmt: skip


def send(folder: Path, repo: str) -> Result:
    refs = [folder / "style.safetensors", folder / "style-000001.safetensors"]
    client = Client(sleep=lambda seconds: None)
    return publish([str(ref) for ref in refs], repo, Said(), Options(), client)


def prepared(folder: Path, at: int) -> None:
    lora(folder, seed=2 * at)
    lora(folder, "style-000001.safetensors", 2 * at + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_publication_survives_a_fault_of_any_request(hub_both: LocalHub, tmp_path: Path, kind: str) -> None:
    """As many publications as one makes requests: the fault hits another one each time."""
    prepared(tmp_path, 99)
    send(tmp_path, "tester/first")
    for at in range(len(hub_both.log())):
        prepared(tmp_path, at)
        hub_both.clear()
        fault = hub_both.fault(kind, skip=at, **KINDS[kind])
        done = send(tmp_path, f"tester/style-{at}")
        assert fault["hits"] == 1
        assert [title[:7] for title in hub_both.commits(done.repo)].count("Publish") == 1
        files = {name: hashlib.sha256(data).hexdigest() for name, data in hub_both.files(done.repo).items()}
        sent = {change.path: change.sha256 for change in done.changes if change.sha256}
        assert len(sent) == 4
        assert {name: files[name] for name in sent} == sent


@pytest.mark.parametrize(
    "fault", [{"kind": "slow", "rate": 1 << 20, "times": 3}, {"kind": "norange", "times": 99}], ids=["slow", "norange"]
)
def test_a_publication_survives_a_hub_that_is_slow_or_knows_no_ranges(
    hub_both: LocalHub, tmp_path: Path, fault: dict[str, Any]
) -> None:
    prepared(tmp_path, 1)
    hub_both.fault(**fault)
    done = send(tmp_path, REPO)
    assert (done.created, send(tmp_path, REPO).created) == (True, False)
    assert [title[:7] for title in hub_both.commits(REPO)].count("Publish") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_pull_survives_a_fault_of_any_request(hub_both: LocalHub, tmp_path: Path, kind: str) -> None:
    data = noise(300_000)
    hub_both.upload(REPO, {"a.safetensors": data})
    hub_both.requests.clear()
    run(hub_both, f"{REPO}/a.safetensors", tmp_path / "first", index=False)
    hit = 0
    for at in range(len(hub_both.log())):
        hub_both.clear()
        fault = hub_both.fault(kind, skip=at, **KINDS[kind])
        done = run(hub_both, f"{REPO}/a.safetensors", tmp_path / str(at), index=False)
        hit += fault["hits"]
        assert [item.error for item in done.items] == [None]
        assert (tmp_path / str(at) / "a.safetensors").read_bytes() == data
        assert os.listdir(tmp_path / str(at)) == ["a.safetensors"]
    assert hit >= 4  # xet needs fewer requests for what it has just had
