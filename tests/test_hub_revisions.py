"""Branches: publishing to one, making it where it is missing, and pulling from a branch, a tag, a commit or a pull request."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hubtool.actions.outdated import outdated
from hubtool.actions.publish import publish
from hubtool.actions.publish_facts import Said
from hubtool.actions.publish_result import Options, Result
from hubtool.errors import HubError, UsageProblem
from hubtool.hub.client import Client
from tests.support import pulling
from tests.support.linking import rescan
from tests.support.publishing import lora

if TYPE_CHECKING:
    from tests.support.hub import LocalHub  # pytest_plugins imports it first

pytest_plugins = ["tests.support.hub"]

REPO = "tester/style"
MAIN = "pytorch_lora_weights.safetensors"


def send(ref: Path, revision: str = "main", **options: Any) -> Result:
    return publish([str(ref)], REPO, Said(), Options(revision=revision, **options), Client(sleep=lambda seconds: None))


def test_a_branch_gets_the_commit_and_main_stays(hub_both: LocalHub, tmp_path: Path) -> None:
    send(lora(tmp_path))
    main = hub_both.head(REPO)
    hub_both.api().create_branch(REPO, branch="v2")
    done = send(lora(tmp_path, seed=5), "v2")
    assert (done.created, done.commit) == (True, hub_both.head(REPO, "v2"))
    assert hub_both.head(REPO) == main
    assert hub_both.files(REPO, "v2")[MAIN] != hub_both.files(REPO)[MAIN]
    assert send(lora(tmp_path, seed=5), "v2").created is False


def test_a_branch_that_is_missing_begins_at_main(hub_both: LocalHub, tmp_path: Path) -> None:
    hub_both.put(REPO, {"notes.txt": "mine"})
    send(lora(tmp_path), "v2/next")
    assert hub_both.files(REPO, "v2/next")["notes.txt"] == b"mine"
    assert [title[:7] for title in hub_both.commits(REPO, "v2/next")].count("Publish") == 1
    assert MAIN not in hub_both.files(REPO)


def test_a_repository_and_its_branch_are_made_together(hub: LocalHub, tmp_path: Path) -> None:
    done = send(lora(tmp_path), "v2")
    assert (done.commit, done.visibility) == (hub.head(REPO, "v2"), "private")
    assert MAIN not in hub.files(REPO)


@pytest.mark.parametrize("kind", ["lost_response", "status", "reset"])
def test_a_fault_while_the_branch_is_made_is_survived(hub: LocalHub, tmp_path: Path, kind: str) -> None:
    hub.put(REPO, {"notes.txt": "mine"})
    fault = hub.fault(kind, "/branch/", "POST", **({"status": 503} if kind == "status" else {}))
    done = send(lora(tmp_path), "v2")
    assert fault["hits"] == 1
    assert done.commit == hub.head(REPO, "v2")


def test_a_dry_run_says_that_the_branch_will_be_made_and_makes_none(hub: LocalHub, tmp_path: Path) -> None:
    hub.put(REPO, {"notes.txt": "mine"})
    done = send(lora(tmp_path), "v2", dry_run=True)
    assert "no branch v2 yet" in done.warnings[0]
    assert {change.path: change.action for change in done.changes}["notes.txt"] == "keep"
    assert "v2" not in hub.store.repos["model", REPO]["branches"]
    assert not hub.log("/branch/|/commit/", "POST")


def test_what_cannot_be_committed_to_is_refused_before_anything_is_sent(hub: LocalHub, tmp_path: Path) -> None:
    commit = hub.put(REPO, {"notes.txt": "mine"})
    for revision, options in ((commit, {}), ("v2", {"pull_request": True}), ("a b", {}), ("a..b~1", {})):
        with pytest.raises(UsageProblem):
            send(lora(tmp_path), revision, **options)
    with pytest.raises(HubError, match="no revision refs/pr/9"):
        send(lora(tmp_path), "refs/pr/9")
    assert not hub.log("", "POST")


def test_the_branch_that_was_published_is_what_outdated_compares(hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    path = lora(tmp_path / "models")
    rescan(path.parent)
    send(path, "v2")
    assert [(one.verdict.status, one.tie.origin.revision) for one in outdated()] == [("current", "v2")]
    hub.put(REPO, {MAIN: b"of main"})
    assert [one.verdict.status for one in outdated()] == ["current"]
    hub.put(REPO, {MAIN: b"of the branch"}, branch="v2")
    assert [one.verdict.status for one in outdated()] == ["changed"]


def test_what_was_published_to_a_branch_is_pulled_from_it(hub_both: LocalHub, tmp_path: Path) -> None:
    done = send(lora(tmp_path), "v2/next")
    expected = hub_both.files(REPO, "v2/next")[MAIN]
    hub_both.api().create_tag(REPO, tag="v2.0", revision="v2/next")
    for at, revision in enumerate(("v2%2Fnext", "v2.0", done.commit)):
        found = pulling.run(hub_both, f"hf://{REPO}@{revision}/{MAIN}", tmp_path / str(at), index=False)
        assert found.commit == done.commit
        assert (tmp_path / str(at) / MAIN).read_bytes() == expected
    with pytest.raises(HubError, match="no revision v9"):
        pulling.run(hub_both, f"hf://{REPO}@v9", tmp_path / "none")


def test_the_command_publishes_to_a_branch(hub: LocalHub, tmp_path: Path) -> None:
    path = lora(tmp_path)
    dry = hub.run("publish", str(path), REPO, "--revision", "v2", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    done = hub.run("publish", str(path), REPO, "--revision", "v2")
    assert done.returncode == 0, done.stderr
    assert MAIN in hub.files(REPO, "v2")
    assert hub.run("publish", str(path), REPO, "--revision", "v2", "--pr").returncode == 2
