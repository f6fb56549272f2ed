"""Publishing: one commit that survives what a hub and a network do to it, and that carries nothing it should not."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hubtool.actions.hub import Hub
from hubtool.actions.library import open_store, reading
from hubtool.actions.publish import publish
from hubtool.actions.publish_facts import Said
from hubtool.actions.publish_result import Options, Result
from hubtool.actions.scan import scan
from hubtool.errors import HubError, HubtoolError, UnsafeFile, UsageProblem
from hubtool.hub.client import Client
from hubtool.registry import hub_facts
from tests.support.files import write_safetensors
from tests.support.publishing import STEM, lora

if TYPE_CHECKING:
    from tests.support.hub import LocalHub

pytest_plugins = ["tests.support.hub"]

HOME = "/home"  # of no machine in particular
REPO = "tester/style"
SECRET = "hf_" + "Zq9" * 10
FAULTS = {
    "status": {"kind": "status", "path": "/commit/", "method": "POST", "status": 500, "times": 2},
    "unavailable": {"kind": "status", "path": "/preupload/|/tree/|/api/models/tester", "status": 503, "times": 2},
    "ratelimit": {"kind": "ratelimit", "path": "/commit/", "method": "POST", "reset": 1, "times": 1},
    "reset": {"kind": "reset", "path": "/commit/", "method": "POST", "times": 1},
    "lost_response": {"kind": "lost_response", "path": "/commit/", "method": "POST", "times": 1},
    "race": {"kind": "race", "path": "/commit/", "method": "POST", "times": 1, "file": "theirs.txt", "content": "theirs"},
    "storage": {"kind": "status", "path": "/put/|/v1/xorbs/", "status": 500, "times": 1},
    "listing": {"kind": "reset", "path": "/tree/", "times": 1},
    "create": {"kind": "lost_response", "path": "/api/repos/create", "times": 1},
}  # fmt: skip


def client() -> Client:
    return Client(sleep=lambda seconds: None)


def send(*refs: Path, said: Said | None = None, repo: str = REPO, **options: Any) -> Result:
    return publish([str(ref) for ref in refs], repo, said or Said(), Options(**options), client())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def our_commits(hub: LocalHub, repo: str = REPO) -> list[str]:
    return [title for title in hub.commits(repo) if title.startswith("Publish")]


# one commit


def test_a_publication_is_one_private_commit_whose_every_hash_is_read_back(hub_both: LocalHub, tmp_path: Path) -> None:
    done = send(lora(tmp_path))
    files = hub_both.files(REPO)
    assert {"README.md", "hubtool.json", "pytorch_lora_weights.safetensors"} <= set(files)
    assert our_commits(hub_both) == ["Publish style"]
    assert hub_both.store.repos["model", REPO]["private"] is True
    assert (done.created, done.commit, done.visibility) == (True, hub_both.head(REPO), "private")
    index = json.loads(files["hubtool.json"])
    assert {row["path"]: row["sha256"] for row in index["files"]} == {
        "pytorch_lora_weights.safetensors": sha256(files["pytorch_lora_weights.safetensors"])
    }
    assert "base_model_relation: adapter" in files["README.md"].decode()


def test_publishing_twice_makes_no_commit(hub_both: LocalHub, tmp_path: Path) -> None:
    path = lora(tmp_path)
    first = send(path)
    hub_both.requests.clear()
    second = send(path)
    assert (second.created, second.commit) == (False, first.commit)
    assert not hub_both.log("/commit/", "POST")
    assert not hub_both.log("/put/|/v1/xorbs/")


def test_thirty_files_are_one_commit(hub_both: LocalHub, tmp_path: Path) -> None:
    paths = [lora(tmp_path)] + [lora(tmp_path, f"style-{at:06}.safetensors", at) for at in range(1, 30)]
    send(*paths)
    assert len(our_commits(hub_both)) == 1
    assert len(hub_both.log("/commit/", "POST")) == 1
    names = set(hub_both.files(REPO))
    assert len([name for name in names if name.startswith("epochs/")]) == 29


@pytest.mark.parametrize("name", FAULTS)
def test_nothing_is_lost_or_doubled_whatever_fails(hub_both: LocalHub, tmp_path: Path, name: str) -> None:
    hub_both.fault(**FAULTS[name])
    done = send(lora(tmp_path), lora(tmp_path, "style-000001.safetensors", 1))
    files = hub_both.files(REPO)
    assert {"pytorch_lora_weights.safetensors", "epochs/style-000001.safetensors", "README.md"} <= set(files)
    assert len(our_commits(hub_both)) == 1
    for change in done.changes:
        if change.sha256:
            assert sha256(files[change.path]) == change.sha256
    if name == "race":
        assert files["theirs.txt"] == b"theirs"
    with reading() as reader:
        receipt = hub_facts.last_receipt(reader, hub_both.url, REPO)
    assert receipt is not None
    assert receipt.commit == hub_both.head(REPO) == done.commit


def test_a_race_for_the_card_merges_the_text_of_both(hub: LocalHub, tmp_path: Path) -> None:
    send(lora(tmp_path))
    card = hub.files(REPO)["README.md"].decode()
    hub.fault("race", "/commit/", method="POST", file="README.md", content=card + "\nTheir words.\n")
    send(lora(tmp_path, seed=2), said=Said(strength=0.7))
    after = hub.files(REPO)["README.md"].decode()
    assert "Their words." in after
    assert "**0.7**" in after


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "corrupt", "offset": 20}, {"kind": "truncate", "fraction": 0.5}, {"kind": "short", "bytes": 7}, {"kind": "reset"},
        {"kind": "status", "status": 503}, {"kind": "slow", "rate": 20000}, {"kind": "norange"},
    ],
    ids=lambda fault: fault["kind"],
)  # fmt: skip
def test_a_card_that_arrives_damaged_is_never_merged(hub: LocalHub, tmp_path: Path, fault: dict[str, Any]) -> None:
    send(lora(tmp_path))
    card = hub.files(REPO)["README.md"].decode() + "\nMine.\n"
    hub.put(REPO, {"README.md": card})
    hub.fault(path="README.md", **fault)
    send(lora(tmp_path, seed=2), said=Said(strength=0.7))
    after = hub.files(REPO)["README.md"].decode()
    assert "\nMine.\n" in after
    assert after.count("## Use") == 1


def test_a_hub_that_keeps_failing_is_explained_and_nothing_is_committed(hub: LocalHub, tmp_path: Path) -> None:
    hub.fault("status", "/commit/", method="POST", status=500, times=99)
    with pytest.raises(HubError, match="500"):
        send(lora(tmp_path))
    assert our_commits(hub) == []


def test_a_hub_without_xet_is_explained(hub: LocalHub, tmp_path: Path) -> None:
    hub.fault("status", "xet-write-token", status=404, times=99)
    with pytest.raises(HubError) as caught:
        send(lora(tmp_path))
    assert "HF_HUB_DISABLE_XET" in str(caught.value.hint)
    assert len(hub.log("xet-write-token")) == 1


def test_a_token_that_may_only_read_is_told_about_rights(hub: LocalHub, tmp_path: Path) -> None:
    hub.put(REPO, {"a.txt": "a"})
    with pytest.raises(HubError) as caught:
        publish([str(lora(tmp_path))], REPO, client=Client(token="hf_readtoken", sleep=lambda seconds: None))
    assert "hf_readtoken" not in str(caught.value) + str(caught.value.hint)


# pull requests


def test_a_stranger_opens_a_pull_request_and_only_one(hub_both: LocalHub, tmp_path: Path) -> None:
    hub_both.put("other/style", {"README.md": "---\nlicense: mit\n---\n# Theirs\n"})
    hub_both.fault("lost_response", "/commit/", method="POST", times=1)
    path = lora(tmp_path)
    first = send(path, repo="other/style", pull_request=True)
    second = send(path, repo="other/style", pull_request=True)
    assert first.pull_request == second.pull_request
    assert hub_both.commits("other/style")[0] == "put"
    assert len(hub_both.store.repos["model", "other/style"]["prs"]) == 1
    assert second.created is False


def test_a_pull_request_needs_a_repository(hub: LocalHub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="does not exist"):
        send(lora(tmp_path), repo="other/none", pull_request=True)


# what is in it


def test_public_is_only_what_was_asked_to_be(hub: LocalHub, tmp_path: Path) -> None:
    assert send(lora(tmp_path), repo="tester/open", public=True).visibility == "public"
    send(lora(tmp_path))
    again = send(lora(tmp_path), public=True)
    assert again.visibility == "private"
    assert again.warnings


def test_files_of_other_people_stay_and_superseded_ones_of_ours_go(hub: LocalHub, tmp_path: Path) -> None:
    hub.put(REPO, {"notes.txt": "mine"})
    send(lora(tmp_path), lora(tmp_path, "style-000001.safetensors", 1), lora(tmp_path, "style-000002.safetensors", 2))
    done = send(lora(tmp_path), lora(tmp_path, "style-000002.safetensors", 2), prune=True)
    actions = {change.path: change.action for change in done.changes}
    assert actions["epochs/style-000001.safetensors"] == "delete"
    assert actions["notes.txt"] == actions["epochs/style-000002.safetensors"] == "keep"
    assert "epochs/style-000001.safetensors" not in hub.files(REPO)
    kept = send(lora(tmp_path))
    assert all(change.action != "delete" for change in kept.changes)
    assert "epochs/style-000002.safetensors" in hub.files(REPO)["README.md"].decode()


def test_private_metadata_never_leaves_not_even_inside_a_receipt_of_origin(hub: LocalHub, tmp_path: Path) -> None:
    from hubtool.layouts import receipt

    said = {
        "ss_dataset_dirs": '{"10_sks": {"img_count": 1}}', "ss_tag_frequency": '{"10_sks": {"sks dog": 1}}', "ss_steps": "9",
        "ss_sd_model_name": f"{HOME}/alice/base.safetensors", "ot_config": '{"workspace_dir": "C:\\\\Users\\\\alice\\\\w"}',
    }  # fmt: skip
    done = send(lora(tmp_path, metadata=said), keep_original=True)
    files = hub.files(REPO)
    assert {finding.code for finding in done.findings} >= {"private"}
    for data in files.values():
        assert b"alice" not in data
        assert b"ss_dataset_dirs" not in data
    data = files["pytorch_lora_weights.safetensors"]
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    found = receipt.load(header["__metadata__"])
    assert found is not None
    assert b"alice" not in found.raw
    assert header["__metadata__"]["ss_steps"] == "9"
    assert "sks dog" in files["README.md"].decode()


def test_metadata_can_be_kept_but_a_secret_is_refused_and_never_quoted(hub: LocalHub, tmp_path: Path) -> None:
    kept = send(lora(tmp_path, metadata={"ss_sd_model_name": f"{HOME}/alice/base.safetensors"}), keep_metadata=True)
    assert any("as they are" in finding.message for finding in kept.findings)
    path = lora(tmp_path, "other.safetensors", metadata={"note": f"key {SECRET}", "comment": "x"})
    with pytest.raises(UnsafeFile) as caught:
        send(path, repo="tester/secret", keep_metadata=True)
    assert SECRET not in str(caught.value)
    assert ("model", "tester/secret") not in hub.store.repos
    send(path, repo="tester/secret", drop_metadata=("note",))
    assert not any(SECRET.encode() in data for data in hub.files("tester/secret").values())


def test_what_the_hub_would_refuse_is_refused_before_anything_is_sent(hub: LocalHub, tmp_path: Path) -> None:
    with pytest.raises(HubtoolError, match="base_model"):
        send(lora(tmp_path), said=Said(base_models=(f"{HOME}/me/model",)))
    with pytest.raises(HubtoolError, match="license"):
        send(lora(tmp_path), said=Said(licence="my-own"))
    with pytest.raises(UsageProblem):
        send(lora(tmp_path), repo="no-owner")
    assert not hub.log()


def test_previews_make_a_gallery_and_lose_their_metadata(hub: LocalHub, tmp_path: Path) -> None:
    from PIL import Image, PngImagePlugin

    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a sks dog\nNegative prompt: bad\nSteps: 2")
    text.add_text("workflow", f"{HOME}/alice/x")
    Image.new("RGB", (8, 8)).save(tmp_path / "style.preview.png", pnginfo=text)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "more.jpg")
    send(lora(tmp_path), previews=(tmp_path / "more.jpg",))
    files = hub.files(REPO)
    assert {"images/0.png", "images/1.jpg"} <= set(files)
    card = files["README.md"].decode()
    assert "<Gallery />" in card
    assert "text: a sks dog" in card
    assert b"alice" not in files["images/0.png"]
    (tmp_path / "style.preview.png").unlink()
    send(lora(tmp_path), said=Said(strength=0.5))
    again = hub.files(REPO)
    assert "images/0.png" in again
    assert "url: images/0.png" in again["README.md"].decode()


def test_a_pickle_is_published_as_safetensors(hub: LocalHub, tmp_path: Path) -> None:
    import torch

    path = tmp_path / "toy.pt"
    torch.save(
        {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 768)}, "name": "toy", "step": 1}, path
    )
    send(path, repo="tester/toy", keep_original=True)
    names = set(hub.files("tester/toy"))
    assert "learned_embeds.safetensors" in names
    assert not [name for name in names if name.endswith(".pt")]
    assert "instance_prompt: toy" in hub.files("tester/toy")["README.md"].decode()


def test_a_file_that_is_canonical_already_goes_up_with_its_own_bytes(hub: LocalHub, tmp_path: Path) -> None:
    from hubtool.actions.convert import convert
    from hubtool.ops.target import Target

    convert(lora(tmp_path), tmp_path / "diffusers.safetensors", Target(layout="diffusers"))
    send(tmp_path / "diffusers.safetensors")
    assert hub.files(REPO)["pytorch_lora_weights.safetensors"] == (tmp_path / "diffusers.safetensors").read_bytes()


def test_an_adapter_that_diffusers_cannot_read_keeps_its_name_and_says_so(hub: LocalHub, tmp_path: Path) -> None:
    tensors = {
        f"{STEM}.hada_w1_a": ("F16", (320, 4), bytes(2560)), f"{STEM}.hada_w1_b": ("F16", (4, 768), bytes(6144)),
        f"{STEM}.hada_w2_a": ("F16", (320, 4), bytes(2560)), f"{STEM}.hada_w2_b": ("F16", (4, 768), bytes(6144)),
        f"{STEM}.alpha": ("F16", (), b"\x00\x40"),
    }  # fmt: skip
    path = write_safetensors(tmp_path / "loha.safetensors", tensors)
    done = send(path, repo="tester/loha")
    assert hub.files("tester/loha")["loha.safetensors"] == path.read_bytes()
    assert "not-canonical" in {finding.code for finding in done.findings}
    card = hub.files("tester/loha")["README.md"].decode()
    assert "load_lora_weights" not in card
    assert "- loha" in card


# plans and receipts


def test_a_dry_run_shows_everything_and_sends_nothing(hub: LocalHub, tmp_path: Path) -> None:
    done = send(lora(tmp_path), dry_run=True)
    assert {change.action for change in done.changes} == {"add"}
    assert done.commit is None
    assert "+base_model: stable-diffusion-v1-5/stable-diffusion-v1-5" in done.card_diff
    assert {entry["method"] for entry in hub.log()} <= {"GET", "HEAD"}
    assert ("model", REPO) not in hub.store.repos


def test_an_offline_plan_is_made_against_the_last_receipt(hub: LocalHub, tmp_path: Path) -> None:
    path = lora(tmp_path)
    send(path)
    hub.requests.clear()
    same = send(path, dry_run=True, offline=True)
    assert same.basis == "receipt"
    assert {change.path for change in same.changes if change.action not in ("keep",)} <= {"hubtool.json"}
    other = send(lora(tmp_path, seed=3), said=Said(strength=0.3), dry_run=True, offline=True)
    actions = {change.path: change.action for change in other.changes}
    assert actions["pytorch_lora_weights.safetensors"] == actions["README.md"] == "change"
    assert "+Recommended strength: **0.3**" in other.card_diff
    assert not hub.log()
    with pytest.raises(UsageProblem):
        send(path, offline=True)


def test_the_library_keeps_a_receipt_with_every_hash(hub: LocalHub, tmp_path: Path) -> None:
    path = lora(tmp_path)
    with open_store() as store:
        scan(store, [str(tmp_path)])
    done = send(path, keep_original=True)
    send(path, keep_original=True)
    with reading() as reader:
        (receipt,) = hub_facts.receipts(reader, repo=REPO)
        origins = hub_facts.origins(reader, repo=REPO)
    assert receipt.commit == done.commit
    files = hub.files(REPO)
    assert {one.path: one.sha256 for one in receipt.files if one.sha256} == {
        name: sha256(data) for name, data in files.items() if name != ".gitattributes"
    }
    assert receipt.card == files["README.md"].decode()
    # the converted file too: its artifact is the one that it was made from
    assert {origin.path for origin in origins} == {"kohya/style.safetensors", "pytorch_lora_weights.safetensors"}
    assert {origin.how for origin in origins} == {"published"}
    assert len({origin.artifact for origin in origins}) == 1


def test_a_merge_names_the_repositories_of_its_parents(hub: LocalHub, tmp_path: Path) -> None:
    from hubtool.actions.lineage import record_output
    from hubtool.registry import browse, hub_store
    from hubtool.registry.text import raw_path

    tensors = {"model.diffusion_model.x": ("F16", (2, 2), bytes(8))}
    parents = [write_safetensors(tmp_path / f"{name}.safetensors", tensors, {"n": name}) for name in "ab"]
    child = write_safetensors(tmp_path / "child.safetensors", tensors, {"n": "c"})
    with open_store() as store:
        scan(store, [str(tmp_path)])
        for parent in parents:
            place = browse.at_path(store, raw_path(str(parent)))
            assert place is not None
            origin = hub_facts.Origin(hub.url, f"me/{parent.stem}", "x.safetensors", "0" * 40, "pulled")
            hub_store.record_origin(store, place.artifact_id, origin)
        record_output(store, child, parents, "merge")
    from hubtool.actions.publish_library import known

    assert known(child, None).bases == ("me/a", "me/b")
    assert known(child, None).merged


# secrets of our own


def test_the_token_appears_in_nothing_written_said_or_sent(hub: LocalHub, tmp_path: Path) -> None:
    hub.tokens[SECRET] = {"user": "tester", "role": "write"}
    path = lora(tmp_path)
    hub.fault("status", "/commit/", method="POST", status=500, times=1)
    runs = [
        hub.run("publish", str(path), REPO, "--strength", "0.5", HF_TOKEN=SECRET),
        hub.run("publish", str(path), REPO, "--json", "--dry-run", HF_TOKEN=SECRET),
        hub.run("publish", str(path), "other/none", HF_TOKEN=SECRET),
        hub.run("-vv", "publish", str(lora(tmp_path, "leak.safetensors", 4, {"x": SECRET})), REPO, HF_TOKEN=SECRET),
    ]
    assert [run.returncode for run in runs] == [0, 0, 6, 7], [run.stderr for run in runs]
    written = "".join(run.stdout + run.stderr for run in runs).encode()
    leak = tmp_path / "leak.safetensors"
    for found in (*tmp_path.rglob("*"), Path(hub.home)):
        if found.is_file() and found != leak and "hub-data" not in found.parts:
            written += found.read_bytes()
    written += b"".join(hub.files(REPO).values())
    assert SECRET.encode() not in written


def test_the_command_prints_the_plan_and_the_address(hub: LocalHub, tmp_path: Path) -> None:
    path = lora(tmp_path)
    done = hub.run("publish", str(path), REPO, "--trigger", "sks dog")
    assert done.returncode == 0, done.stderr
    assert "committed" in done.stdout
    assert re.search(r"add +pytorch_lora_weights\.safetensors", done.stdout)
    again = hub.run("publish", str(path), REPO, "--trigger", "sks dog", "--json")
    document = json.loads(again.stdout)
    assert document["created"] is False
    assert {change["action"] for change in document["changes"]} == {"keep"}
    refused = hub.run("publish", str(path), REPO, "--license", "nope", "--dry-run")
    assert refused.returncode == 1
    checked = hub.run("card", f"hf://{REPO}", "--json")
    assert json.loads(checked.stdout)["ok"] is True


def test_python_does_the_same(hub: LocalHub, tmp_path: Path) -> None:
    mine = Hub(hub.url, "hf_testtoken")
    plan = mine.publish(lora(tmp_path), REPO, trigger_words="sks dog", strength=0.5, dry_run=True)
    assert plan.commit is None
    done = mine.publish(lora(tmp_path), REPO, trigger_words="sks dog", strength=0.5)
    assert done.created
    assert "hf_testtoken" not in repr(mine) + repr(mine.client)
    assert mine.check_card(f"hf://{REPO}").ok
    assert not mine.publish([lora(tmp_path)], REPO, trigger_words=["sks dog"], strength=0.5).created
    (pulled,) = mine.pull(f"hf://{REPO}", tmp_path / "got")
    assert not pulled.failed
    assert (tmp_path / "got" / "pytorch_lora_weights.safetensors").is_file()
    assert mine.index(f"hf://{REPO}").repo == REPO
    assert len(mine.inspect(f"hf://{REPO}/pytorch_lora_weights.safetensors")) == 1


def test_a_person_s_words_survive_the_next_publication(hub: LocalHub, tmp_path: Path) -> None:
    send(lora(tmp_path))
    card = hub.files(REPO)["README.md"].decode()
    hub.put(
        REPO,
        {
            "README.md": card.replace("# style", "# The style\n\nMade with love.").replace(
                "creativeml-openrail-m", "mit", 1
            )
        },
    )
    done = send(lora(tmp_path, seed=5), said=replace(Said(), strength=0.4))
    after = hub.files(REPO)["README.md"].decode()
    assert "# The style\n\nMade with love." in after
    assert "license: mit" in after
    assert "**0.4**" in after
    assert "license" in done.kept


def test_permissions_of_civitai_travel_as_a_licence_and_forbid(hub: LocalHub, tmp_path: Path) -> None:
    from hubtool.registry import hub_store
    from hubtool.registry.hub_facts import Answer

    path = lora(tmp_path)
    digest = sha256(path.read_bytes())
    model = {
        "name": "S",
        "allowNoCredit": False,
        "allowCommercialUse": ["Image"],
        "allowDerivatives": False,
        "allowDifferentLicense": True,
    }
    said = {
        "id": 2, "modelId": 1, "name": "v1", "nsfwLevel": 8, "air": "urn:air:sd1:lora:civitai:1@2", "trainedWords": ["sks dog"],
        "model": model, "creator": {"username": "bob"}, "files": [{"hashes": {"SHA256": digest.upper()}}],
    }  # fmt: skip
    with open_store() as store:
        scan(store, [str(tmp_path)])
        hub_store.record_answers(store, [Answer(digest, "x", 200, json.dumps(said).encode(), 1, 2)])
    with pytest.raises(HubtoolError, match="changed or merged"):
        send(path)
    assert not hub.log("", "POST")
    done = send(path, permitted=True)
    files = hub.files(REPO)
    card = files["README.md"].decode()
    assert "license_name: civitai-permissions" in card
    assert "- not-for-all-audiences" in card
    assert "urn:air:sd1:lora:civitai:1@2" in card
    assert "You may not share it changed" in files["LICENSE.md"].decode()
    assert not done.refused
    own = send(path, permitted=True, said=Said(licence="mit"))
    assert "license: mit" in hub.files(REPO)["README.md"].decode()
    assert {change.action for change in own.changes if change.path == "LICENSE.md"} == {"keep"}


def test_a_header_that_names_another_licence_is_told(hub: LocalHub, tmp_path: Path) -> None:
    done = send(lora(tmp_path, metadata={"modelspec.license": "My Own Terms"}), dry_run=True)
    assert "card-disagrees" in {finding.code for finding in done.findings}


def test_a_checkpoint_goes_up_under_its_own_name_with_a_snippet_for_it(hub: LocalHub, tmp_path: Path) -> None:
    from tests.support.checkpoints import single

    path = single("sd1", tmp_path, metadata={"modelspec.license": "mit"})
    send(path, said=Said(family="sd1"), repo="tester/model")
    files = hub.files("tester/model")
    assert files["sd1.safetensors"] == path.read_bytes()
    card = files["README.md"].decode()
    assert "StableDiffusionPipeline.from_single_file(file" in card
    assert "base_model_relation: finetune" in card
    assert "license: mit" in card


def test_vectors_for_two_text_encoders_say_how_they_are_loaded(hub: LocalHub, tmp_path: Path) -> None:
    tensors = {"clip_l": ("F32", (2, 768), bytes(6144)), "clip_g": ("F32", (2, 1280), bytes(10240))}
    path = write_safetensors(tmp_path / "toy.safetensors", tensors)
    done = send(path, repo="tester/toy")
    card = hub.files("tester/toy")["README.md"].decode()
    assert "toy.safetensors" in hub.files("tester/toy")
    assert card.count("load_textual_inversion(vectors") == 2
    assert "needs-arguments" in {finding.code for finding in done.findings}


def test_what_was_said_once_need_not_be_said_again(hub: LocalHub, tmp_path: Path) -> None:
    said = Said(words=("sks dog",), strength=0.6, licence="mit", title="Style of dogs", tags=("dogs",))
    first = send(lora(tmp_path), said=said)
    again = send(lora(tmp_path))
    assert (again.created, again.commit) == (False, first.commit)
    send(lora(tmp_path, seed=9), said=Said(strength=0.0))
    card = hub.files(REPO)["README.md"].decode()
    assert "license: mit" in card
    assert "instance_prompt: sks dog" in card
    assert "**0**" in card


def test_an_index_that_somebody_spoiled_is_no_obstacle(hub: LocalHub, tmp_path: Path) -> None:
    send(lora(tmp_path))
    for text in (
        "[]",
        "{",
        '{"version": 1, "files": [1, {"path": 3}], "card": {"said": {"words": [1], "strength": "x"}, "front": 1}}',
    ):
        hub.put(REPO, {"hubtool.json": text})
        send(lora(tmp_path))
        assert json.loads(hub.files(REPO)["hubtool.json"])["version"] == 1


def test_an_adapter_for_a_language_model_is_published_for_peft_alone(hub: LocalHub, tmp_path: Path) -> None:
    stem = "base_model.model.transformer.h.0.attn.c_attn"
    tensors = {
        f"{stem}.lora_A.weight": ("F32", (4, 16), bytes(256)),
        f"{stem}.lora_B.weight": ("F32", (48, 4), bytes(768)),
    }
    folder = tmp_path / "talk"
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["c_attn"],
        "base_model_name_or_path": f"{HOME}/bob/gpt2",
        "fan_in_fan_out": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    done = send(folder, said=Said(base_models=("openai-community/gpt2",), licence="mit"), repo="tester/talk")
    files = hub.files("tester/talk")
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(files)
    assert "pytorch_lora_weights.safetensors" not in files
    written = json.loads(files["adapter_config.json"])
    assert written["base_model_name_or_path"] == "openai-community/gpt2"
    assert (written["r"], written["lora_alpha"], written["fan_in_fan_out"]) == (4, 8, True)
    card = files["README.md"].decode()
    assert "library_name: peft" in card
    assert "PeftModel.from_pretrained" in card
    assert not any(b"bob" in data for data in files.values())
    assert not done.refused
