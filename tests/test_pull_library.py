"""Pulling and what is here already: the library, the cache of huggingface_hub, and no network at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hubtool.actions.library import open_store
from hubtool.actions.pull import pull
from hubtool.actions.pull_result import Options
from hubtool.actions.scan import scan
from hubtool.errors import HubError, UsageProblem
from hubtool.hub.client import Client
from hubtool.registry import browse, hub_facts
from tests.support.files import floats, safetensors_bytes
from tests.support.pulling import CARD, CONTENT, MODULE, lora, noise, quick, run

if TYPE_CHECKING:
    from tests.support.hub import LocalHub  # pytest_plugins imports it first

pytest_plugins = ["tests.support.hub"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


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


def test_the_base_that_a_card_names_is_a_fact_of_the_file(hub: LocalHub, out: Path) -> None:
    hub.put("tester/style", {"a.safetensors": lora(), "README.md": CARD})
    run(hub, "tester/style", out)
    found = json.loads(hub.run("ls", "base:stable-diffusion-xl-base", "--json").stdout)
    assert [row["base_model"] for row in found] == ["stabilityai/stable-diffusion-xl-base-1.0"]
    assert json.loads(hub.run("show", found[0]["id"], "--json").stdout)["base_model"] == found[0]["base_model"]
    (out / "a.safetensors").rename(out / "b.safetensors")
    assert hub.run("scan", str(out)).returncode == 0
    assert [row["name"] for row in json.loads(hub.run("ls", "base:xl-base", "--json").stdout)] == ["b.safetensors"]


def test_the_base_that_a_file_names_itself_stays(hub: LocalHub, out: Path) -> None:
    own = safetensors_bytes(
        {f"{MODULE}.lora_down.weight": floats(4, 8), f"{MODULE}.lora_up.weight": floats(8, 4)},
        {"ss_sd_model_name": "mine.safetensors"},
    )
    hub.put("tester/style", {"a.safetensors": own, "README.md": CARD})
    run(hub, "tester/style", out)
    [row] = json.loads(hub.run("ls", "--json").stdout)
    assert row["base_model"] == "mine.safetensors"


def test_what_is_broken_on_the_hub_is_said(hub: LocalHub, out: Path) -> None:
    hub.put(
        "tester/style", {"a.safetensors": lora()[:-8], "b.pt": b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00id\x85R."}
    )
    done = run(hub, "tester/style", out)
    assert not done.failed
    assert sorted(warning.split(":")[0].rpartition("/")[2] for warning in done.warnings) == ["a.safetensors", "b.pt"]


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
