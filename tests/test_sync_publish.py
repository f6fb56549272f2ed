"""``sync --publish`` of publications that are more than one file as it is: further layouts, originals, epochs, PEFT folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hubtool.actions import sync
from hubtool.actions.library import open_store
from hubtool.actions.outdated import outdated
from hubtool.actions.publish import publish
from hubtool.actions.publish_facts import Said
from hubtool.actions.publish_result import Options
from hubtool.errors import HubtoolError
from hubtool.hub.client import Client
from tests.support import publishing
from tests.support.linking import REPO, lora, rescan

if TYPE_CHECKING:
    from tests.support.hub import LocalHub  # pytest_plugins imports it first

pytest_plugins = ["tests.support.hub"]


def client() -> Client:
    return Client(sleep=lambda seconds: None)


def synced() -> list[sync.Step]:
    steps = sync.plan(outdated())
    with open_store() as store:
        sync.carry_out(store, steps, publish=True)
    return steps


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({"layouts": ("peft", "comfy")}, {"comfy/style.safetensors", "adapter_model.safetensors", "adapter_config.json"}),
        ({"keep_original": True}, {"kohya/style.safetensors"}),
    ],
    ids=["layouts", "original"],
)  # fmt: skip
def test_every_layout_of_a_publication_is_published_again(
    hub_both: LocalHub, tmp_path: Path, more: dict[str, Any], names: set[str]
) -> None:
    """The files that were made of one artifact are made of it anew; epochs and a stranger's file beside them are kept apart."""
    folder = tmp_path / "models"
    folder.mkdir()
    first, epoch = publishing.lora(folder), publishing.lora(folder, "style-000001.safetensors", 1)
    rescan(folder)
    publish([str(first), str(epoch)], REPO, Said(strength=0.5), Options(**more), client())
    hub_both.put(REPO, {"theirs.safetensors": lora(3)})
    before = hub_both.files(REPO)
    publishing.lora(folder, seed=7)
    rescan(folder)
    steps = synced()
    assert {step.state for step in steps if step.action == "publish"} == {"done"}, [step.reason for step in steps]
    after = hub_both.files(REPO)
    assert after.keys() == before.keys()
    assert names <= after.keys()
    same = {"epochs/style-000001.safetensors", "theirs.safetensors", ".gitattributes", "adapter_config.json"}
    assert {name for name in after if after[name] == before[name]} == same & after.keys()
    assert b"**0.5**" in after["README.md"]
    assert [step.action for step in sync.plan(outdated()) if step.action == "publish"] == []


def test_a_folder_of_peft_is_published_again(hub: LocalHub, tmp_path: Path) -> None:
    folder = publishing.talk(tmp_path / "models" / "talk", 1)
    rescan(folder.parent)
    said = Said(base_models=("openai-community/gpt2",), licence="mit")
    publish([str(folder)], REPO, said, Options(), client())
    before = hub.files(REPO)
    publishing.talk(folder, 9)
    rescan(folder.parent)
    assert [(step.action, step.state) for step in synced()] == [("publish", "done")]
    after = hub.files(REPO)
    assert after.keys() == before.keys()
    assert after["adapter_model.safetensors"] != before["adapter_model.safetensors"]
    assert after["adapter_config.json"] == before["adapter_config.json"]


def test_a_published_form_of_a_file_that_is_gone_is_left_to_a_person(hub: LocalHub, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    first, epoch = publishing.lora(folder), publishing.lora(folder, "style-000001.safetensors", 1)
    rescan(folder)
    publish([str(first), str(epoch)], REPO, Said(), Options(), client())
    publishing.lora(folder, seed=7)
    epoch.unlink()
    rescan(folder)
    steps = [step for step in synced() if step.action == "publish"]
    assert [step.state for step in steps] == ["failed"]
    with pytest.raises(HubtoolError, match="no longer here"):
        sync.raise_failures(steps)


@pytest.mark.parametrize("index", ["[]", '{"version": 1}', '{"version": 1, "files": [{"path": "x", "role": 3}]}'])
def test_a_spoiled_index_is_no_obstacle(hub: LocalHub, tmp_path: Path, index: str) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    path = publishing.lora(folder)
    rescan(folder)
    publish([str(path)], REPO, Said(), Options(), client())
    publishing.lora(folder, seed=7)
    rescan(folder)
    hub.put(REPO, {"hubtool.json": index})
    assert [(step.action, step.state) for step in synced()] == [("publish", "done")]
