"""Pulling: the right bytes or none, over Xet and HTTP, through every fault the server can make; and what the library then knows."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hubtool.actions.library import open_store
from hubtool.actions.pull import Options, Pulled, pull
from hubtool.actions.scan import scan
from hubtool.errors import CorruptFile, HubError, NotFound, UsageProblem, WouldOverwrite
from hubtool.hub.client import Client
from hubtool.registry import browse, hub_facts
from tests.support.files import floats, safetensors_bytes

if TYPE_CHECKING:
    from tests.support.hub import LocalHub  # pytest_plugins imports it first

pytest_plugins = ["tests.support.hub"]

MODULE = "lora_unet_down_blocks_0_attentions_0_proj_in"
CONTENT = r"/get/|/xorb/"  # where the storage serves bytes: plain files, and xet's chunks
CARD = """---
base_model: stabilityai/stable-diffusion-xl-base-1.0
license: openrail++
instance_prompt: "sks dog, oil painting"
tags: [lora, diffusers]
---
# A dog
"""


def lora(seed: float = 0, width: int = 8) -> bytes:
    shapes = {f"{MODULE}.lora_down.weight": (4, width), f"{MODULE}.lora_up.weight": (width, 4)}
    return safetensors_bytes({name: floats(*shape, start=seed) for name, shape in shapes.items()})


def noise(size: int, seed: int = 1) -> bytes:
    """Bytes that no chunk store finds twice."""
    return b"".join(hashlib.sha256(b"%d %d" % (seed, at)).digest() for at in range(size // 32 + 1))[:size]


def quick(hub: LocalHub) -> Client:
    """A client that does not wait between tries."""
    return Client(hub.url, sleep=lambda _: None)


def run(hub: LocalHub, text: str, output: Path, **options: Any) -> Pulled:
    return pull([text], Options(output, **options), client=quick(hub))[0]


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


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
    assert request["sent"] < 2_000_001


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


# --------------------------------------------------------------------------------------------- the library


def test_the_library_knows_origin_and_card(hub_both: LocalHub, out: Path) -> None:
    data = lora()
    hub_both.upload("tester/style", {"a.safetensors": data, "README.md": CARD.encode()})
    run(hub_both, "tester/style/a.safetensors", out)
    with open_store() as store:
        row = browse.find(store, hashlib.sha256(data).hexdigest())
        [origin] = hub_facts.origins(store, artifact=row.key)
        card = hub_facts.card(store, hub_both.url, "tester/style")
    assert (origin.how, origin.repo, origin.path) == ("pulled", "tester/style", "a.safetensors")
    assert (origin.revision, origin.commit) == ("main", hub_both.head("tester/style"))
    assert set(row.trigger_words) >= {"sks dog", "oil painting"}
    assert card is not None
    assert card.base_models == ("stabilityai/stable-diffusion-xl-base-1.0",)
    assert card.license == "openrail++"


def test_a_peft_folder_is_one_artifact_with_the_origin_of_its_weights(hub: LocalHub, out: Path) -> None:
    name = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": floats(4, 8), f"{name}.lora_B.weight": floats(8, 4)}
    config = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]})
    hub.put("tester/peft", {"adapter_model.safetensors": safetensors_bytes(tensors), "adapter_config.json": config})
    run(hub, "tester/peft", out)
    with open_store() as store:
        place = browse.at_path(store, os.fsencode(out))
        assert place is not None
        assert [origin.path for origin in hub_facts.origins(store, artifact=place.artifact_id)] == [
            "adapter_model.safetensors"
        ]


def test_without_an_output_files_go_below_the_root_of_the_library(hub: LocalHub, tmp_path: Path) -> None:
    hub.put("tester/style", {"sub/a.safetensors": lora()})
    (tmp_path / "models").mkdir()
    with open_store() as store:
        scan(store, [str(tmp_path / "models")])
    done = pull(["tester/style"], client=quick(hub))[0]
    assert done.items[0].target == tmp_path / "models/tester/style/sub/a.safetensors"
    assert done.items[0].id
    assert done.items[0].target.read_bytes() == lora()


def test_without_an_output_and_without_a_root_a_folder_must_be_named(hub: LocalHub) -> None:
    hub.put("tester/style", {"a.safetensors": lora()})
    with pytest.raises(UsageProblem, match="not clear where") as caught:
        pull(["tester/style"], client=quick(hub))
    assert "-o" in str(caught.value.hint)


def test_what_the_library_has_is_not_fetched_again(hub: LocalHub, tmp_path: Path) -> None:
    hub.put("tester/style", {"a.safetensors": noise(100_000)})
    models = tmp_path / "models"
    models.mkdir()
    (models / "mine.safetensors").write_bytes(noise(100_000))
    with open_store() as store:
        scan(store, [str(models)])
    done = pull(["tester/style/a.safetensors"], client=quick(hub))[0]
    assert (done.items[0].how, done.items[0].target) == ("library", models / "mine.safetensors")
    assert os.listdir(models) == ["mine.safetensors"]
    copied = run(hub, "tester/style/a.safetensors", tmp_path / "elsewhere")
    assert copied.items[0].how == "copied"
    assert (tmp_path / "elsewhere/a.safetensors").read_bytes() == noise(100_000)
    assert not hub.log(CONTENT)
    with open_store() as store:
        assert [one.how for one in hub_facts.origins(store)] == ["pulled"]


def test_a_copy_of_the_library_that_was_changed_meanwhile_is_not_used(hub: LocalHub, tmp_path: Path) -> None:
    hub.put("tester/style", {"a.safetensors": noise(100_000)})
    (tmp_path / "models").mkdir()
    mine = tmp_path / "models/mine.safetensors"
    mine.write_bytes(noise(100_000))
    with open_store() as store:
        scan(store, [str(tmp_path / "models")])
    mine.write_bytes(b"x" * 100_000)
    done = run(hub, "tester/style/a.safetensors", tmp_path / "out", index=False)
    assert done.items[0].how == "http"
    assert (tmp_path / "out/a.safetensors").read_bytes() == noise(100_000)


# --------------------------------------------------------------------------------------------- cache, offline


def cached(hub: LocalHub, data: bytes) -> None:
    """Let huggingface_hub's own cache hold ``tester/style``."""
    hub.upload("tester/style", {"a.safetensors": data, "README.md": CARD.encode()})
    hub.api().snapshot_download("tester/style")
    hub.requests.clear()


def test_the_local_cache_is_used_when_it_has_the_bytes(hub_both: LocalHub, out: Path) -> None:
    cached(hub_both, noise(100_000))
    done = run(hub_both, "tester/style", out, index=False)
    assert {item.how for item in done.items} == {"copied"}
    assert (out / "a.safetensors").read_bytes() == noise(100_000)
    assert not hub_both.log(CONTENT)


def test_a_damaged_cache_is_not_believed(hub: LocalHub, out: Path) -> None:
    cached(hub, noise(100_000))
    for blob in (hub.home / "hub").rglob("blobs/*"):
        if blob.is_file() and blob.stat().st_size == 100_000:
            blob.resolve().write_bytes(b"y" * 100_000)
    done = run(hub, "tester/style/a.safetensors", out, index=False)
    assert done.items[0].how in ("http", "xet")
    assert (out / "a.safetensors").read_bytes() == noise(100_000)


@pytest.mark.parametrize("how", ["offline", "down"])
def test_without_a_hub_the_cache_stands_in(
    hub_both: LocalHub, out: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(hub_both, noise(100_000))
    if how == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        client = quick(hub_both)
    else:
        client = Client("http://127.0.0.1:9", sleep=lambda _: None)
    done = pull(["tester/style"], Options(out), client=client)[0]
    assert done.local
    assert done.commit == hub_both.head("tester/style")
    assert (out / "a.safetensors").read_bytes() == noise(100_000)
    assert any("local cache" in warning for warning in done.warnings)


def test_offline_without_a_cache_says_so(hub: LocalHub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("tester/style", {"a.safetensors": lora()})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE") as caught:
        run(hub, "tester/style", out)
    assert caught.value.hint == "unset HF_HUB_OFFLINE"


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


_PEAK = """
import sys
from pathlib import Path
from hubtool.actions.pull import Options, pull
done = pull(["tester/big/big.safetensors"], Options(Path(sys.argv[1]), index=False))[0]
assert done.items[0].error is None, done.items[0].error
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])  # of this program, not of who started it
"""


def sparse(hub: LocalHub, size: int) -> None:
    """A large file of zeros in the store, that takes no room."""
    digest = hashlib.sha256()
    block = bytes(1 << 20)
    for _ in range(size >> 20):
        digest.update(block)
    path = Path(hub.store.path("lfs", digest.hexdigest()))
    with open(path, "wb") as file:
        file.truncate(size)
    hub.put("tester/big", {})
    repo = hub.store.repos[("model", "tester/big")]
    head = repo["branches"]["main"]
    files = {**repo["commits"][head]["files"], "big.safetensors": hub.store.lfs_entry(digest.hexdigest(), size)}
    hub.store.commit(repo, "main", files, "big", "", "tester", [head])


def test_memory_does_not_grow_with_the_file(hub: LocalHub, out: Path) -> None:
    peaks = []
    for size in (16 << 20, 256 << 20):
        sparse(hub, size)
        folder = out / str(size)
        command = [sys.executable, "-c", _PEAK, str(folder)]
        done = subprocess.run(command, env=hub.environment(), capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert (folder / "big.safetensors").stat().st_size == size
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + 40_000  # kilobytes; the file grew by 240 MB
