"""Pulling: the right bytes at the right place, and going on where an earlier run stopped."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hubtool.actions.pull import pull
from hubtool.actions.pull_result import Options
from hubtool.errors import FileError, UsageProblem, WouldOverwrite
from tests.support.pulling import CARD, CONTENT, leftovers, lora, noise, quick, run

if TYPE_CHECKING:
    from tests.support.hub import LocalHub  # pytest_plugins imports it first

pytest_plugins = ["tests.support.hub"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# --------------------------------------------------------------------------------------------- the plain way


def test_a_file_arrives_whole_and_alone(hub_both: LocalHub, out: Path) -> None:
    data = noise(3_000_000)
    commit = hub_both.upload("tester/style", {"style.safetensors": data, "notes.txt": b"hello\n"})
    done = run(hub_both, "hf://tester/style/style.safetensors", out, index=False)
    assert done.commit == commit
    assert (out / "style.safetensors").read_bytes() == data
    assert os.listdir(out) == ["style.safetensors"]
    assert done.items[0].received == len(data)


def test_xet_carries_the_bytes_only_while_it_is_on(hub_both: LocalHub, out: Path) -> None:
    hub_both.upload("tester/style", {"a.safetensors": noise(200_000)})
    hub_both.requests.clear()
    done = run(hub_both, "tester/style/a.safetensors", out, index=False)
    xet = bool(hub_both.log("/xet/"))
    assert xet == (os.environ["HF_HUB_DISABLE_XET"] == "0")
    assert done.items[0].how == ("xet" if xet else "http")


def test_a_whole_repository_comes_without_what_is_of_no_use(hub: LocalHub, out: Path) -> None:
    files = {
        "a.safetensors": lora(),
        "a.ckpt": b"twin",
        "b.pt": b"alone",
        "sub/c.json": "{}",
        "README.md": CARD,
        ".hidden": b"x",
    }
    hub.put("tester/style", files)
    done = run(hub, "tester/style", out, index=False)
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == {"a.safetensors", "b.pt", "sub/c.json", "README.md"}
    assert done.left_out == {"a.ckpt": "there as safetensors", ".hidden": "hidden", ".gitattributes": "hidden"}


def test_a_folder_of_a_repository_comes_as_the_content_of_the_output(hub: LocalHub, out: Path) -> None:
    hub.put("tester/style", {"epochs/1.safetensors": lora(1), "epochs/2.safetensors": lora(2), "a.safetensors": lora()})
    run(hub, "tester/style/epochs", out, index=False)
    assert sorted(os.listdir(out)) == ["1.safetensors", "2.safetensors"]


def test_patterns_choose_files(hub: LocalHub, out: Path) -> None:
    hub.put("tester/style", {"a.safetensors": lora(), "b.safetensors": lora(2), "README.md": CARD})
    run(hub, "tester/style", out, index=False, include=("*.safetensors",), exclude=("b*",))
    assert os.listdir(out) == ["a.safetensors"]


def test_a_branch_a_tag_and_a_pull_request_can_be_named(hub: LocalHub, out: Path) -> None:
    hub.put("tester/style", {"a.safetensors": lora(1)})
    api = hub.api()
    api.create_tag("tester/style", tag="v1.0")
    hub.put("tester/style", {"a.safetensors": lora(2)})
    info = api.create_commit(
        "tester/style", [_add("a.safetensors", lora(3), hub)], commit_message="three", create_pr=True
    )
    for revision, seed in (("v1.0", 1), ("main", 2), (info.pr_revision, 3)):
        folder = out / str(seed)
        run(hub, f"hf://tester/style@{revision}/a.safetensors", folder, index=False)
        assert (folder / "a.safetensors").read_bytes() == lora(seed)


def _add(name: str, data: bytes, hub: LocalHub) -> Any:
    from huggingface_hub import CommitOperationAdd

    source = hub.home / "source"
    source.write_bytes(data)
    return CommitOperationAdd(name, str(source))


def test_an_empty_file_is_a_file(hub: LocalHub, out: Path) -> None:
    hub.put("tester/style", {"empty.txt": "", "a.safetensors": lora()})
    run(hub, "tester/style/empty.txt", out, index=False)
    assert (out / "empty.txt").read_bytes() == b""


def test_a_second_pull_moves_nothing(hub_both: LocalHub, out: Path) -> None:
    hub_both.upload("tester/style", {"a.safetensors": noise(500_000)})
    run(hub_both, "tester/style/a.safetensors", out, index=False)
    hub_both.requests.clear()
    again = run(hub_both, "tester/style/a.safetensors", out, index=False)
    assert again.items[0].how == "present"
    assert not hub_both.log(CONTENT)
    assert os.listdir(out) == ["a.safetensors"]


def test_another_file_at_the_place_is_kept_unless_forced(hub: LocalHub, out: Path) -> None:
    hub.put("tester/style", {"a.safetensors": lora()})
    out.mkdir()
    (out / "a.safetensors").write_bytes(b"mine")
    done = run(hub, "tester/style/a.safetensors", out, index=False)
    assert isinstance(done.items[0].error, WouldOverwrite)
    assert (out / "a.safetensors").read_bytes() == b"mine"
    run(hub, "tester/style/a.safetensors", out, index=False, force=True)
    assert (out / "a.safetensors").read_bytes() == lora()
    assert os.listdir(out) == ["a.safetensors"]


def test_two_files_for_one_place_are_refused_before_anything_is_fetched(hub: LocalHub, out: Path) -> None:
    hub.put("tester/one", {"a.safetensors": lora(1)})
    hub.put("tester/two", {"a.safetensors": lora(2)})
    with pytest.raises(UsageProblem, match="two different files"):
        pull(["tester/one/a.safetensors", "tester/two/a.safetensors"], Options(out), client=quick(hub))
    assert not out.exists()


def test_texts_of_several_repositories_in_one_folder_give_way(hub: LocalHub, out: Path) -> None:
    hub.put("tester/one", {"one.safetensors": lora(1), "README.md": CARD})
    hub.put("tester/two", {"two.safetensors": lora(2), "README.md": "# Two\n"})
    hub.put("tester/three", {"three.safetensors": lora(3), "README.md": "# Three\n"})
    both = pull(["tester/one", "tester/two"], Options(out, index=False), client=quick(hub))
    third = run(hub, "tester/three", out, index=False)
    assert sorted(os.listdir(out)) == ["README.md", "one.safetensors", "three.safetensors", "two.safetensors"]
    assert (out / "README.md").read_text() == CARD
    for result in (both[1], third):
        assert result.left_out["README.md"] == "another file of this name lies there"
        assert not result.failed


def test_a_dry_run_writes_nothing(hub: LocalHub, out: Path) -> None:
    hub.put("tester/style", {"a.safetensors": lora()})
    done = run(hub, "tester/style", out, dry_run=True)
    assert [item.how for item in done.items] == ["download"]
    assert not out.exists()
    assert not hub.log(CONTENT)


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/x", "a/../../x", "a\\..\\b", "C:/x"])
def test_a_name_that_leaves_the_folder_is_refused(hub: LocalHub, out: Path, name: str) -> None:
    hub.put("tester/style", {"a.safetensors": lora()})
    listing = [{"type": "file", "oid": "0" * 40, "size": 1, "path": name}]
    hub.fault("status", "/tree/", status=200, json=listing)
    with pytest.raises(Exception, match="leaves its folder"):
        run(hub, "tester/style", out)
    assert not out.exists()


# --------------------------------------------------------------------------------------------- resuming


def interrupted(hub: LocalHub, out: Path, bytes_sent: int) -> None:
    """A run that dies after ``bytes_sent`` bytes, as by Ctrl-C."""

    class Stop(KeyboardInterrupt):
        pass

    from contextlib import contextmanager

    seen = 0

    def advance(count: int) -> None:
        nonlocal seen
        seen += count
        if seen >= bytes_sent:
            raise Stop

    @contextmanager
    def progress(_text: str, _total: int | None) -> Any:
        yield advance

    with pytest.raises(Stop):
        pull(["tester/style/a.safetensors"], Options(out, index=False), client=quick(hub), progress=progress)


def test_an_interrupted_pull_goes_on_in_the_next_run(hub_both: LocalHub, out: Path) -> None:
    data = noise(8_000_000)
    hub_both.upload("tester/style", {"a.safetensors": data})
    interrupted(hub_both, out, 4_000_000)
    assert len(leftovers(out)) in (1, 2)
    assert not (out / "a.safetensors").exists()
    done = run(hub_both, "tester/style/a.safetensors", out, index=False)
    item = done.items[0]
    assert item.resumed >= 4_000_000
    assert item.received == len(data) - item.resumed
    assert (out / "a.safetensors").read_bytes() == data
    assert os.listdir(out) == ["a.safetensors"]


def test_a_resumed_pull_asks_with_range_and_if_range(hub: LocalHub, out: Path) -> None:
    data = noise(4_000_000)
    hub.put("tester/style", {"a.safetensors": data})
    interrupted(hub, out, 2_000_000)
    [state] = out.glob(".*.json")
    assert json.loads(state.read_text())["etag"] == f'"{hashlib.sha256(data).hexdigest()}"'
    hub.requests.clear()
    run(hub, "tester/style/a.safetensors", out, index=False)
    [request] = hub.log("/get/")
    assert request["range"].startswith("bytes=2")
    assert (request["if_range"], request["status"]) == (f'"{hashlib.sha256(data).hexdigest()}"', 206)
    assert request["sent"] < 2_000_001


def test_a_part_of_a_file_that_changed_in_the_storage_is_thrown_away(hub: LocalHub, out: Path) -> None:
    """The server honours If-Range (RFC 9110 13.1.5): another ETag, so the whole file comes, and none of the part stays."""
    data = noise(4_000_000)
    hub.put("tester/style", {"a.safetensors": data})
    interrupted(hub, out, 2_000_000)
    [part] = [path for path in out.glob(".*") if path.suffix != ".json"]
    part.write_bytes(b"of another version" * 100_000)
    hub.requests.clear()
    hub.fault("set_headers", "/get/", "GET", headers={"ETag": '"changed"'})
    done = run(hub, "tester/style/a.safetensors", out, index=False)
    [request] = hub.log("/get/")
    assert (request["range"], request["status"], request["sent"]) == ("bytes=1800000-", 200, len(data))
    assert (done.items[0].received, done.items[0].resumed) == (len(data), 0)
    assert (out / "a.safetensors").read_bytes() == data
    assert os.listdir(out) == ["a.safetensors"]


def test_a_full_disk_is_said_and_what_had_arrived_stays(
    hub_both: LocalHub, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = noise(4_000_000)
    hub_both.upload("tester/style", {"a.safetensors": data})
    real = os.pwrite

    def full(fd: int, block: Any, offset: int) -> int:
        if offset + len(block) > 2_500_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, block, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        done = run(hub_both, "tester/style/a.safetensors", out, index=False)
    assert isinstance(done.items[0].error, FileError)
    assert "No space left" in str(done.items[0].error)
    assert not (out / "a.safetensors").exists()
    done = run(hub_both, "tester/style/a.safetensors", out, index=False)
    assert (out / "a.safetensors").read_bytes() == data
    assert os.listdir(out) == ["a.safetensors"]


def test_damage_to_what_an_earlier_run_left_is_noticed(hub: LocalHub, out: Path) -> None:
    data = noise(4_000_000)
    hub.put("tester/style", {"a.safetensors": data})
    interrupted(hub, out, 2_000_000)
    [part] = [path for path in out.glob(".*") if path.suffix != ".json"]
    with open(part, "r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    run(hub, "tester/style/a.safetensors", out, index=False)
    assert (out / "a.safetensors").read_bytes() == data
    assert os.listdir(out) == ["a.safetensors"]


def test_what_is_left_of_another_version_is_not_continued(hub: LocalHub, out: Path) -> None:
    hub.put("tester/style", {"a.safetensors": noise(4_000_000, 1)})
    interrupted(hub, out, 2_000_000)
    hub.put("tester/style", {"a.safetensors": noise(4_000_000, 2)})
    done = run(hub, "tester/style/a.safetensors", out, index=False)
    assert done.items[0].resumed == 0
    assert (out / "a.safetensors").read_bytes() == noise(4_000_000, 2)
    assert os.listdir(out) == ["a.safetensors"]


def test_a_killed_process_loses_nothing_that_had_arrived(hub: LocalHub, out: Path) -> None:
    data = noise(6_000_000)
    hub.put("tester/style", {"a.safetensors": data})
    hub.fault("slow", CONTENT, "GET", rate=2_000_000)
    command = [sys.executable, "-m", "hubtool", "pull", "tester/style/a.safetensors", "-o", str(out), "--no-index"]
    with subprocess.Popen(command, env=hub.environment(), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and sum(path.stat().st_size for path in out.glob(".a*-pull")) < 2_000_000:
            time.sleep(0.02)
        process.kill()
    assert process.returncode != 0
    assert not (out / "a.safetensors").exists()
    done = run(hub, "tester/style/a.safetensors", out, index=False)
    assert done.items[0].resumed >= 2_000_000
    assert (out / "a.safetensors").read_bytes() == data


def test_a_file_that_another_process_fetches_is_left_to_it(hub: LocalHub, out: Path) -> None:
    from hubtool.hub.partial import partial

    hub.put("tester/style", {"a.safetensors": lora()})
    client = quick(hub)
    [entry] = [one for one in client.tree(client.resolve(_ref("tester/style")).ref) if one.path == "a.safetensors"]
    out.mkdir()
    with partial(out / "a.safetensors", entry):
        done = run(hub, "tester/style/a.safetensors", out, index=False)
    assert "another hubtool" in str(done.items[0].error)


def _ref(text: str) -> Any:
    from hubtool.hub.refs import parse_ref

    return parse_ref(text)
