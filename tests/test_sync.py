"""``sync``: the plan, and what it does to files, library and hub, against a hub and a Civitai on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from hubtool.actions import sync
from hubtool.actions.civitai import look_up
from hubtool.actions.hub_known import hub_known
from hubtool.actions.library import open_store
from hubtool.actions.link import link
from hubtool.actions.outdated import outdated
from hubtool.actions.publish import publish
from hubtool.actions.publish_again import again
from hubtool.actions.publish_result import Options
from hubtool.cli.main import cli
from hubtool.errors import HubtoolError, PartialFailure
from hubtool.registry import browse, hub_facts
from hubtool.registry.hub_store import PublishedFile, Receipt, record_receipt
from tests.support.civitai_server import CivitaiServer, civitai_server
from tests.support.library import tag
from tests.support.linking import FILE, REPO, lora, rescan

if TYPE_CHECKING:
    from tests.support.hub import LocalHub  # pytest_plugins imports it first

pytest_plugins = ["tests.support.hub", "tests.support.linked"]


def run(*, pull: bool = False, publish: bool = False) -> list[sync.Step]:
    steps = sync.plan(outdated())
    with open_store() as store:
        sync.carry_out(store, steps, pull=pull, publish=publish)
    return steps


def acts(steps: list[sync.Step]) -> list[tuple[str, str]]:
    return [(step.action, step.state) for step in steps]


def published(hub: LocalHub, file: Path) -> None:
    """A receipt as ``publish`` leaves it: the very bytes of ``file`` are on the hub."""
    commit = hub.put(REPO, {FILE: file.read_bytes()})
    with open_store() as store:
        row = browse.find(store, str(file))
        held = PublishedFile(FILE, row.sha256 or "", row.size, None, row.key)
        record_receipt(store, Receipt(hub.url, REPO, commit, (held,)))


def test_nothing_is_done_where_everything_is_current(linked: LocalHub) -> None:
    assert run(pull=True, publish=True) == []


def test_a_newer_file_is_planned_and_pulled_only_when_allowed(linked: LocalHub, file: Path) -> None:
    linked.put(REPO, {FILE: lora(2)})
    assert acts(run()) == [("pull", "planned")]
    assert file.read_bytes() == lora(1)
    assert acts(run(pull=True)) == [("pull", "done")]
    assert file.read_bytes() == lora(2)
    assert run(pull=True) == []


def test_what_a_person_said_goes_on_to_the_newer_file(linked: LocalHub, file: Path) -> None:
    with open_store() as store:
        tag(store, browse.find(store, str(file)).key, ["mine"])
    linked.put(REPO, {FILE: lora(2)})
    run(pull=True)
    with open_store() as store:
        row = browse.find(store, str(file))
        origin = hub_facts.origins(store, artifact=row.key)[-1]
    assert row.tags == ("mine",)
    assert (origin.how, origin.commit) == ("pulled", linked.head(REPO))


def test_every_copy_is_replaced(linked: LocalHub, file: Path) -> None:
    copy = file.parent / "copy.safetensors"
    copy.write_bytes(lora(1))
    rescan(file.parent)
    linked.put(REPO, {FILE: lora(2)})
    run(pull=True)
    assert [copy.read_bytes(), file.read_bytes()] == [lora(2)] * 2


def test_a_file_edited_after_the_last_scan_is_not_replaced(linked: LocalHub, file: Path) -> None:
    linked.put(REPO, {FILE: lora(2)})
    steps = sync.plan(outdated())
    file.write_bytes(lora(9))
    with open_store() as store:
        sync.carry_out(store, steps, pull=True)
    assert acts(steps) == [("pull", "failed")]
    assert file.read_bytes() == lora(9)
    with pytest.raises(HubtoolError, match="edited after the last scan"):
        sync.raise_failures(steps)


def test_a_change_on_both_sides_is_left_alone(linked: LocalHub, file: Path) -> None:
    file.write_bytes(lora(9))
    rescan(file.parent)
    linked.put(REPO, {FILE: lora(2)})
    steps = run(pull=True, publish=True)
    assert acts(steps) == [("keep", "planned")]
    assert "edited here" in steps[0].reason
    assert file.read_bytes() == lora(9)


def test_a_file_that_moved_is_followed_without_a_download(linked: LocalHub, file: Path) -> None:
    linked.api().move_repo(REPO, "tester/renamed")
    assert acts(run()) == [("record", "done")]
    with open_store() as store:
        assert [origin.repo for origin in hub_facts.origins(store)] == ["tester/renamed"]
    assert run() == []


def test_a_newer_commit_with_the_same_bytes_is_noted(linked: LocalHub) -> None:
    linked.put(REPO, {"README.md": "# New"})
    assert acts(run()) == [("record", "done")]
    before = len(linked.log())
    assert run() == []
    assert len(linked.log()) == before + 1


@pytest.mark.parametrize("gone", ["repository", "file"])
def test_what_the_hub_no_longer_has_stays_here(linked: LocalHub, file: Path, gone: str) -> None:
    if gone == "repository":
        linked.api().delete_repo(REPO)
    else:
        linked.api().delete_file(FILE, REPO)
    assert acts(run(pull=True, publish=True)) == [("keep", "planned")]
    assert file.read_bytes() == lora(1)


def test_a_download_that_arrives_damaged_changes_nothing(linked: LocalHub, file: Path) -> None:
    linked.put(REPO, {FILE: lora(2)})
    linked.fault("corrupt", "/get/|/resolve/|/xorb/", method="GET", offset=100, times=99)
    steps = run(pull=True)
    assert acts(steps) == [("pull", "failed")]
    assert file.read_bytes() == lora(1)


def test_one_failure_stops_no_other_step(linked: LocalHub, file: Path) -> None:
    other = file.parent / "other.safetensors"
    other.write_bytes(lora(5))
    rescan(file.parent)
    linked.put("tester/other", {"other.safetensors": lora(5)})
    with open_store() as store:
        link(store, str(other), "tester/other")
    linked.put(REPO, {FILE: lora(2)})
    linked.put("tester/other", {"other.safetensors": lora(6)})
    steps = sync.plan(outdated())
    other.write_bytes(lora(9))
    with open_store() as store:
        sync.carry_out(store, steps, pull=True)
    assert sorted(acts(steps)) == [("pull", "done"), ("pull", "failed")]
    with pytest.raises(PartialFailure):
        sync.raise_failures(steps)


def test_a_published_file_that_was_edited_is_published_again(hub: LocalHub, file: Path) -> None:
    published(hub, file)
    file.write_bytes(lora(7))
    rescan(file.parent)
    assert acts(run()) == [("publish", "planned")]
    steps = run(publish=True)
    assert acts(steps) == [("publish", "done")], steps[0].reason
    assert hub.head(REPO) == outdated()[0].verdict.commit


def test_what_somebody_else_changed_is_not_overwritten(hub: LocalHub, file: Path) -> None:
    published(hub, file)
    hub.put(REPO, {FILE: lora(8)})
    steps = run(pull=True, publish=True)
    assert acts(steps) == [("keep", "planned")]
    assert "somebody changed" in steps[0].reason


def test_a_publication_that_cannot_be_repeated_is_left_to_a_person(hub: LocalHub, file: Path) -> None:
    published(hub, file)
    commit = hub.put(REPO, {"kohya/style.safetensors": lora(1)})
    with open_store() as store:
        row = browse.find(store, str(file))
        held = PublishedFile(FILE, row.sha256 or "", row.size, None, row.key)
        made = PublishedFile("kohya/style.safetensors", "ab" * 32, 5)
        record_receipt(store, Receipt(hub.url, REPO, commit, (held, made), at=2_000_000_000))
    file.write_bytes(lora(7))
    rescan(file.parent)
    steps = run(publish=True)
    assert acts(steps) == [("publish", "failed")]
    assert "hubtool publish" in str(steps[0].error and steps[0].error.hint)


def test_two_files_of_a_repository_are_one_publication(hub: LocalHub, file: Path) -> None:
    other = file.parent / "second.safetensors"
    other.write_bytes(lora(3))
    rescan(file.parent)
    commit = hub.put(REPO, {FILE: lora(1), "more/second.safetensors": lora(3)})
    with open_store() as store:
        rows = [browse.find(store, str(path)) for path in (file, other)]
        names = (FILE, "more/second.safetensors")
        held = tuple(
            PublishedFile(name, row.sha256 or "", row.size, None, row.key)
            for name, row in zip(names, rows, strict=True)
        )
        record_receipt(store, Receipt(hub.url, REPO, commit, held))
    file.write_bytes(lora(7))
    other.write_bytes(lora(8))
    rescan(file.parent)
    steps = sync.plan(outdated())
    with open_store() as store:
        assert again(store, steps[0].comparison.tie.origin, {}).refs == (str(file), str(other))
        sync.carry_out(store, steps)
    assert sorted(step.action for step in steps) == ["keep", "publish"]


def hubtool(*args: str, **env: str) -> Result:
    """A command in this process, which already leads to the local hub."""
    return CliRunner().invoke(cli, list(args), env=env)


@pytest.fixture
def civitai(monkeypatch: pytest.MonkeyPatch) -> Iterator[CivitaiServer]:
    with civitai_server() as running:
        monkeypatch.setenv("HUBTOOL_CIVITAI", running.url)
        yield running


def test_sync_on_the_command_line(linked: LocalHub, file: Path) -> None:
    linked.put(REPO, {FILE: lora(2)})
    planned = hubtool("sync", "--dry-run", "--pull")
    assert planned.exit_code == 0
    assert "pull" in planned.stdout
    assert file.read_bytes() == lora(1)
    assert "hubtool sync --pull" in hubtool("sync").stderr
    done = hubtool("sync", "--pull", "--json")
    document = json.loads(done.stdout)
    assert [(step["action"], step["state"]) for step in document["steps"]] == [("pull", "done")]
    assert document["civitai"] is None
    assert file.read_bytes() == lora(2)


def test_civitai_is_asked_by_sync_only_when_turned_on(linked: LocalHub, civitai: CivitaiServer, file: Path) -> None:
    assert hubtool("sync", HUBTOOL_CIVITAI="").exit_code == 0
    assert hubtool("sync", "--no-civitai").exit_code == 0
    assert civitai.requests == []
    dry = json.loads(hubtool("sync", "--dry-run", "--json").stdout)
    assert (dry["civitai"]["asked"], civitai.requests) == (1, [])
    done = json.loads(hubtool("sync", "--json").stdout)
    assert (done["civitai"]["asked"], len(civitai.requests)) == (1, 1)


def test_civitai_is_asked_by_link_when_told_to(linked: LocalHub, civitai: CivitaiServer, file: Path) -> None:
    with open_store() as store:
        civitai.add(browse.find(store, str(file)).sha256 or "", 7)
    assert json.loads(hubtool("link", "--civitai", "--dry-run", "--json").stdout) == {"would_ask": 1}
    done = hubtool("link", "--civitai", str(file))
    assert done.stdout == "known 1  unknown 0  unhashed 0  failed 0\n"
    assert "Style 7 v7.0 https://civitai.com/models/1007" in done.stderr
    assert "hf_testtoken" not in str(civitai.seen_headers)


def test_what_hubs_said_is_shown_without_a_network(linked: LocalHub, civitai: CivitaiServer, file: Path) -> None:
    with open_store() as store:
        civitai.add(browse.find(store, str(file)).sha256 or "", 7)
        look_up(store)
        civitai.close()
        known = hub_known(store, browse.find(store, str(file)))
    assert [(origin["how"], origin["ref"]) for origin in known["origins"]] == [("linked", f"hf://{REPO}/{FILE}")]
    assert known["civitai"]["description"] == "Use at 0.8\n\nA style"
    json.dumps(known)


def test_no_token_is_written_anywhere(linked: LocalHub, civitai: CivitaiServer, file: Path) -> None:
    linked.put(REPO, {FILE: lora(2)})
    said = [linked.run(*words) for words in (("outdated",), ("-v", "sync", "--pull", "--civitai", "--json"), ("log",))]
    assert "hf_testtoken" not in "".join(done.stdout + done.stderr for done in said)
    with open_store() as store:
        assert store.path is not None
        written = [path for path in (*store.path.parent.iterdir(), *file.parent.rglob("*")) if path.is_file()]
    assert not [path for path in written if b"hf_testtoken" in path.read_bytes()]


def test_a_publication_is_followed_from_publish_to_sync(hub: LocalHub, file: Path) -> None:
    made = publish([str(file)], REPO, None, Options())
    assert [(one.verdict.status, one.tie.local, one.tie.origin.how) for one in outdated()] == [
        ("current", "same", "published")
    ]
    file.write_bytes(lora(7))
    rescan(file.parent)
    steps = run(publish=True)
    assert acts(steps) == [("publish", "done")], steps[0].reason
    assert len(hub.commits(REPO)) == 3  # the first one is of the repository itself
    assert hub.head(REPO) != made.commit
    assert run(publish=True) == []


def test_a_civitai_that_fails_ends_with_the_exit_code_of_hubs(
    linked: LocalHub, civitai: CivitaiServer, file: Path
) -> None:
    civitai.fault("status", 99, 403)
    done = hubtool("link", "--civitai")
    assert done.exit_code == 6
    assert "refuses the request (HTTP 403)" in done.stderr
