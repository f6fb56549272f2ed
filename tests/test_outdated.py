"""What hubs have now compared with what the library has: ``outdated``, ``link`` and ``sync``, against a hub on loopback."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner, Result

from hubtool.actions.library import open_store
from hubtool.actions.link import link
from hubtool.actions.outdated import outdated, raise_failures
from hubtool.actions.scan import scan
from hubtool.cli.main import cli
from hubtool.errors import HubError, HubtoolError, NotFound, PartialFailure
from hubtool.registry import browse, hub_facts
from hubtool.registry.hub_store import Origin
from tests.support.files import floats, write_safetensors
from tests.support.linking import DOWN, FILE, REPO, UP, lora, rescan, tie

if TYPE_CHECKING:
    from tests.support.hub import LocalHub  # pytest_plugins imports it first

pytest_plugins = ["tests.support.hub", "tests.support.linked"]


def statuses(*refs: str) -> list[tuple[str, str]]:
    return [(one.verdict.status, one.tie.local) for one in outdated(None, refs)]


def origins() -> list[Origin]:
    with open_store() as store:
        return hub_facts.origins(store)


def test_a_file_is_linked_to_the_file_of_a_repository_with_its_bytes(linked: LocalHub) -> None:
    origin = origins()[0]
    assert (origin.repo, origin.path, origin.how, origin.commit) == (REPO, FILE, "linked", linked.head(REPO))
    assert origin.sha256 == hashlib.sha256(lora(1)).hexdigest()
    assert origin.endpoint == linked.url


def test_linking_downloads_nothing(linked: LocalHub) -> None:
    assert not linked.log("/resolve/")


def test_linking_needs_the_same_bytes(hub: LocalHub, models: Path) -> None:
    hub.put(REPO, {FILE: lora(2)})
    with (
        open_store() as store,
        pytest.raises(HubtoolError, match=f"no file of .* {FILE} has {hashlib.sha256(lora(2)).hexdigest()}"),
    ):
        link(store, str(models / FILE), REPO)
    assert origins() == []


@pytest.mark.parametrize("target", [f"{REPO}/sub", f"hf://{REPO}/sub/copy.safetensors", f"{REPO}@main/sub"])
def test_a_folder_or_a_file_of_the_repository_may_be_named(hub: LocalHub, models: Path, target: str) -> None:
    hub.put(REPO, {FILE: lora(2), "sub/copy.safetensors": lora(1)})
    tie(models / FILE, target)
    assert origins()[0].path == "sub/copy.safetensors"


def test_a_file_at_the_root_is_preferred_to_its_copies(hub: LocalHub, models: Path) -> None:
    hub.put(REPO, {"a/copy.safetensors": lora(1), "z.safetensors": lora(1)})
    tie(models / FILE, REPO)
    assert origins()[0].path == "z.safetensors"


def test_an_older_version_is_linked_by_its_commit(hub: LocalHub, models: Path) -> None:
    old = hub.put(REPO, {FILE: lora(1)})
    hub.put(REPO, {FILE: lora(2)})
    tie(models / FILE, f"{REPO}@{old}")
    assert origins()[0].commit == old
    assert statuses() == [("current", "same")]


def test_a_file_outside_lfs_is_linked_by_its_git_id(hub: LocalHub, tmp_path: Path, models: Path) -> None:
    words = tmp_path / "words" / "adapter.json"
    words.parent.mkdir()
    words.write_text("{}")
    write_safetensors(words.with_suffix(".safetensors"), {DOWN: floats(2, 4), UP: floats(4, 2)})
    rescan(words.parent)
    data = words.with_suffix(".safetensors").read_bytes()
    with hub.store.lock:
        hub.put(REPO, {"README.md": "x"})
    _put_regular(hub, "style.safetensors", data)
    tie(words.with_suffix(".safetensors"), REPO)
    origin = origins()[0]
    assert (origin.sha256, origin.etag) == (None, hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())
    assert statuses() == [("current", "same")]
    hub.put(REPO, {"README.md": "y"})
    assert statuses() == [("current", "same")]


def _put_regular(hub: LocalHub, name: str, data: bytes) -> None:
    found = hub.store.repos[("model", REPO)]
    head = found["branches"]["main"]
    files = {**found["commits"][head]["files"], name: hub.store.put_blob(data)}
    hub.store.commit(found, "main", files, "regular", "", "tester", [head])


def test_a_dry_run_of_link_writes_nothing(hub: LocalHub, models: Path) -> None:
    hub.put(REPO, {FILE: lora(1)})
    with open_store() as store:
        assert not link(store, str(models / FILE), REPO, dry_run=True).recorded
    assert origins() == []


@pytest.mark.parametrize("target", ["tester/none", f"{REPO}@no-such-branch", f"{REPO}/no/such/file"])
def test_linking_to_what_is_not_there_says_so(hub: LocalHub, models: Path, target: str) -> None:
    hub.put(REPO, {FILE: lora(1)})
    with open_store() as store, pytest.raises((HubError, NotFound)):
        link(store, str(models / FILE), target)


def test_an_unhashed_file_is_not_linked(hub: LocalHub, models: Path, tmp_path: Path) -> None:
    hub.put(REPO, {FILE: lora(1)})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.safetensors").write_bytes(lora(3))
    with open_store() as store:
        scan(store, [str(tmp_path / "other")], hashes=False)
        with pytest.raises(HubtoolError, match="not been hashed"):
            link(store, str(tmp_path / "other" / "b.safetensors"), REPO)


def test_what_is_unchanged_is_current_at_the_price_of_one_request(linked: LocalHub) -> None:
    before = len(linked.log())
    assert statuses() == [("current", "same")]
    assert len(linked.log()) == before + 1


def test_a_newer_commit_with_the_same_bytes_is_current(linked: LocalHub) -> None:
    linked.put(REPO, {"README.md": "# New text"})
    found = outdated()[0]
    assert (found.verdict.status, found.outdated) == ("current", False)
    assert found.verdict.commit == linked.head(REPO)


def test_other_bytes_are_a_change_whose_hash_is_known_before_any_download(linked: LocalHub) -> None:
    linked.put(REPO, {FILE: lora(2)})
    found = outdated()[0]
    assert found.verdict.status == "changed"
    assert found.to_json()["now"]["sha256"] == hashlib.sha256(lora(2)).hexdigest()
    assert not linked.log("/resolve/")


def test_a_file_under_another_name_has_moved(linked: LocalHub) -> None:
    _replace(linked, {"new/name.safetensors": lora(1)})
    found = outdated()[0]
    assert (found.verdict.status, found.to_json()["now"]["path"]) == ("moved", "new/name.safetensors")


def test_a_file_that_is_no_longer_there_was_deleted(linked: LocalHub) -> None:
    _replace(linked, {"other.safetensors": lora(2)})
    assert statuses() == [("deleted", "same")]


def _replace(hub: LocalHub, files: dict[str, bytes]) -> None:
    found = hub.store.repos[("model", REPO)]
    entries = {name: hub._entry(name, data) for name, data in files.items()}
    hub.store.commit(found, "main", entries, "replace", "", "tester", [found["branches"]["main"]])


def test_a_repository_under_another_name_has_moved(linked: LocalHub) -> None:
    linked.api().move_repo(REPO, "tester/renamed")
    found = outdated()[0]
    assert (found.verdict.status, found.verdict.repo) == ("moved", "tester/renamed")


def test_a_repository_that_is_gone_is_told_from_a_hub_that_fails(linked: LocalHub) -> None:
    linked.api().delete_repo(REPO)
    found = outdated()
    assert [one.verdict.status for one in found] == ["gone"]
    raise_failures(found)


def test_a_hub_that_fails_makes_files_unknown(linked: LocalHub) -> None:
    linked.fault("status", "/api/models/", status=403, times=99)
    found = outdated()
    assert [one.verdict.status for one in found] == ["unknown"]
    with pytest.raises(HubError):
        raise_failures(found)


def test_repositories_that_answer_are_compared_when_others_do_not(linked: LocalHub, models: Path) -> None:
    linked.put("tester/second", {"b.safetensors": lora(4)})
    (models / "b.safetensors").write_bytes(lora(4))
    rescan(models)
    tie(models / "b.safetensors", "tester/second")
    linked.fault("status", "/tester/second", status=403, times=99)
    found = outdated()
    assert {one.tie.origin.repo: one.verdict.status for one in found} == {REPO: "current", "tester/second": "unknown"}
    with pytest.raises(PartialFailure):
        raise_failures(found)


@pytest.mark.parametrize(
    "fault", [{"kind": "status", "status": 500}, {"kind": "reset"}, {"kind": "ratelimit", "reset": 1}]
)
def test_a_passing_failure_is_not_noticed(linked: LocalHub, fault: dict[str, Any]) -> None:
    linked.fault(path="/api/models/", times=1, **fault)
    assert statuses() == [("current", "same")]


def test_a_file_edited_here_since_is_told(linked: LocalHub, models: Path) -> None:
    (models / FILE).write_bytes(lora(5))
    rescan(models)
    assert statuses() == [("current", "edited")]
    assert outdated()[0].outdated


def test_a_file_missing_here_is_told(linked: LocalHub, models: Path) -> None:
    (models / "keep.safetensors").write_bytes(lora(6))
    (models / FILE).unlink()
    rescan(models)
    assert statuses() == [("current", "missing")]


def test_a_file_linked_again_after_a_change_is_compared_once(linked: LocalHub, models: Path) -> None:
    linked.put(REPO, {FILE: lora(2)})
    (models / FILE).write_bytes(lora(2))
    rescan(models)
    tie(models / FILE, REPO)
    assert statuses() == [("current", "same")]


def test_refs_choose_what_is_compared(linked: LocalHub, models: Path) -> None:
    (models / "b.safetensors").write_bytes(lora(4))
    rescan(models)
    assert statuses(str(models / FILE)) == [("current", "same")]
    assert statuses(str(models / "b.safetensors")) == []


def test_what_a_card_says_is_kept_when_a_file_is_linked(hub: LocalHub, models: Path) -> None:
    card = "---\nlicense: mit\nbase_model: a/base\ninstance_prompt: sks dog, oil\n---\n# Style"
    hub.put(REPO, {FILE: lora(1), "README.md": card})
    tie(models / FILE, REPO)
    with open_store() as store:
        facts = hub_facts.card(store, hub.url, REPO)
        words = browse.find(store, str(models / FILE)).trigger_words
    assert facts is not None
    assert (facts.license, facts.base_models, words) == ("mit", ("a/base",), ("sks dog", "oil"))


def test_the_token_in_use_is_not_sent_to_another_hub(
    hub: LocalHub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put(REPO, {FILE: lora(1)})
    tie(models / FILE, REPO)
    monkeypatch.setenv("HF_ENDPOINT", "https://somewhere.else.example")
    hub.clear()
    assert statuses() == [("current", "same")]
    assert not any("authorization" in {name.lower() for name in row.get("headers", {})} for row in hub.log())


def test_the_library_is_free_while_the_hub_is_asked(linked: LocalHub) -> None:
    from hubtool.actions import outdated as module

    def ask_and_write(endpoint: str) -> Any:
        with open_store() as store, store.transaction():
            return module_client(endpoint)

    module_client = module.client_for
    assert [one.verdict.status for one in outdated(clients=ask_and_write)] == ["current"]


def hubtool(*args: str, **env: str) -> Result:
    """A command in this process, which already leads to the local hub."""
    return CliRunner().invoke(cli, list(args), env=env)


def test_outdated_on_the_command_line(linked: LocalHub) -> None:
    quiet = hubtool("outdated", "--json")
    assert (quiet.exit_code, json.loads(quiet.stdout)) == (0, [])
    linked.put(REPO, {FILE: lora(2)})
    rows = json.loads(hubtool("outdated", "--json").stdout)
    assert [(row["status"], row["local"], row["how"], row["ref"]) for row in rows] == [
        ("changed", "same", "linked", f"hf://{REPO}/{FILE}")
    ]
    assert "changed" in hubtool("outdated").stdout


def test_outdated_on_the_command_line_says_when_the_hub_fails(linked: LocalHub) -> None:
    linked.fault("status", "/api/models/", status=403, times=99)
    done = hubtool("outdated")
    assert done.exit_code == 6
    assert "could not be compared" in done.stderr
    assert "hf_testtoken" not in done.stdout + done.stderr


def test_link_on_the_command_line(hub: LocalHub, models: Path) -> None:
    hub.put(REPO, {FILE: lora(1)})
    done = hubtool("link", str(models / FILE), REPO, "--json")
    document = json.loads(done.stdout)
    assert (done.exit_code, document["ref"], document["recorded"]) == (0, f"hf://{REPO}/{FILE}", True)
    assert hubtool("link", str(models / FILE)).exit_code == 2
    assert hubtool("link", str(models / FILE), "tester/none").exit_code == 6
