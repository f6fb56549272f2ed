"""Reading a repository without downloading it: headers only, every byte counted, nothing for what the library has."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from hubtool.actions.inspect import inspect
from hubtool.actions.library import open_store
from hubtool.actions.remote import RemoteReport, index_remote, inspect_remote
from hubtool.actions.scan import scan
from hubtool.errors import HubError, HubtoolError, NotFound
from hubtool.formats.safetensors import read_header
from hubtool.hub.client import Client
from hubtool.hub.remote import BUDGET, read_remote
from hubtool.registry import hub_facts
from hubtool.resources import schemas
from tests.support.files import floats, framed, safetensors_bytes, scalar, write_safetensors, zeros

if TYPE_CHECKING:
    from tests.support.hub import LocalHub  # pytest_plugins imports it first

pytest_plugins = ["tests.support.hub"]

CONTENT = r"/get/|/xorb/"
STEM = "lora_unet_down_blocks_{}_attentions_{}_transformer_blocks_0_attn{}_to_{}"


def kohya(blocks: int = 2, *, rank: int = 4, metadata: dict[str, str] | None = None, wide: int = 320) -> bytes:
    """A LoRA with alphas; ``blocks`` up to 40 makes the header as long as one likes."""
    tensors: dict[str, Any] = {}
    for at in range(blocks):
        for attention, role in ((one, role) for one in (1, 2) for role in "qkv"):
            stem = STEM.format(at % 3, at // 3, attention, role)
            context = 768 if attention == 2 and role != "q" else wide
            tensors[f"{stem}.alpha"] = scalar(2.0, "F16")
            tensors[f"{stem}.lora_down.weight"] = zeros("F16", rank, context)
            tensors[f"{stem}.lora_up.weight"] = zeros("F16", wide, rank)
    return safetensors_bytes(tensors, metadata)


def quick(hub: LocalHub) -> Client:
    return Client(hub.url, sleep=lambda _: None)


def look(hub: LocalHub, text: str) -> list[RemoteReport]:
    return inspect_remote(text, client=quick(hub))


def said(report: RemoteReport) -> dict[str, Any]:
    assert report.error is None, report.error
    return report.to_json()


SAME = (
    "kind",
    "algorithm",
    "family",
    "family_candidates",
    "layout",
    "ranks",
    "components",
    "tensors",
    "parameters",
    "dtypes",
    "metadata",
)


def test_a_file_is_known_from_its_header(hub_both: LocalHub, tmp_path: Path) -> None:
    data = kohya(metadata={"ss_network_dim": "4", "modelspec.trigger_phrase": "sks dog"})
    hub_both.upload("tester/style", {"style.safetensors": data})
    (tmp_path / "style.safetensors").write_bytes(data)
    local = inspect(tmp_path / "style.safetensors").to_json()
    [report] = look(hub_both, "hf://tester/style/style.safetensors")
    remote = said(report)
    assert {name: remote[name] for name in SAME} == {name: local[name] for name in SAME}
    assert remote["trigger_words"] == local["trigger_words"]
    assert remote["hashes"]["sha256"] == local["hashes"]["sha256"]
    assert remote["path"].startswith("hf://tester/style@")
    assert remote["alphas"] == []
    jsonschema.validate(remote, json.loads((schemas() / "inspect.schema.json").read_text()))


def test_no_tensor_data_is_read_beyond_the_first_read(hub: LocalHub) -> None:
    hub.put("tester/style", {"a.safetensors": kohya(40, rank=64)})
    [report] = look(hub, "tester/style")
    sent = sum(request["sent"] for request in hub.log(CONTENT))
    header = int.from_bytes(kohya(40, rank=64)[:8], "little")
    assert report.received == sent == max(65536, header + 8) <= BUDGET
    assert said(report)["ranks"] == [64]


def test_real_files_are_told_as_well_from_afar(hub: LocalHub, shared: Path) -> None:
    files = sorted(path for path in shared.rglob("*.safetensors") if read_ok(path))
    assert len(files) > 5
    hub.put("tester/real", {f"{at}/{path.name}": path for at, path in enumerate(files)})
    for at, path in enumerate(files):
        client = quick(hub)
        [report] = inspect_remote(f"hf://tester/real/{at}/{path.name}", client=client)
        local, remote = inspect(path, hashes=False, values=False).to_json(), said(report)
        assert report.received <= BUDGET
        if not any(finding["code"] == "header-partial" for finding in remote["findings"]):
            assert {name: remote[name] for name in SAME} == {name: local[name] for name in SAME}, path.name


def read_ok(path: Path) -> bool:
    try:
        inspect(path, hashes=False, values=False)
    except HubtoolError:
        return False
    return True


@pytest.mark.parametrize("comment", [1000, 150_000, 400_000], ids=["short metadata", "long", "longer than the budget"])
def test_a_header_longer_than_the_budget_is_read_at_both_ends(hub: LocalHub, comment: int) -> None:
    metadata = {
        "ss_tag_frequency": json.dumps({"a": {f'tag }},"{at}': at for at in range(comment // 16)}}),
        "ss_network_dim": "8",
    }
    names = [f"lora_unet_{'x' * 40}_{at}" for at in range(900)]
    tensors: dict[str, Any] = {}
    for name in [*(STEM.format(a, b, 1, role) for a in range(3) for b in range(2) for role in "qkv"), *names]:
        tensors[f"{name}.lora_down.weight"] = zeros("F16", 8, 16)
        tensors[f"{name}.lora_up.weight"] = zeros("F16", 16, 8)
    data = safetensors_bytes(tensors, metadata)
    assert int.from_bytes(data[:8], "little") > BUDGET
    hub.put("tester/long", {"a.safetensors": data})
    [report] = look(hub, "tester/long")
    document = said(report)
    assert sum(request["sent"] for request in hub.log(CONTENT)) == report.received <= BUDGET
    assert document["kind"] == "lora"
    assert document["ranks"] == [8]
    assert [finding["code"] for finding in document["findings"]].count("header-partial") == 1
    assert 500 < document["tensors"] < len(tensors)


def test_what_is_read_of_a_long_header_is_what_stands_there(hub: LocalHub, tmp_path: Path) -> None:
    tensors = {f"some.long.name.of.a.tensor.number.{at:05}.weight": zeros("BF16", at % 7 + 1, 3) for at in range(4000)}
    path = write_safetensors(tmp_path / "a.safetensors", tensors, {"a": "b"})
    hub.put("tester/long", {"a.safetensors": path})
    client = quick(hub)
    ref = client.resolve(_ref("tester/long")).ref
    [entry] = [one for one in client.tree(ref) if one.path == "a.safetensors"]
    found = read_remote(client, ref, entry)
    truth = read_header(path).tensors
    assert not found.whole
    for name, tensor in found.file.tensors.items():
        assert replace(tensor, path=path) == truth[name]


def _ref(text: str) -> Any:
    from hubtool.hub.refs import parse_ref

    return parse_ref(text)


@pytest.mark.parametrize("fault", ["norange", "truncate", "reset", "status", "short", "ratelimit", "slow"])
def test_a_fault_is_survived(hub: LocalHub, fault: str) -> None:
    hub.put("tester/style", {"a.safetensors": kohya(12, rank=16)})
    options = {"status": {"status": 503}, "ratelimit": {"reset": 1}, "slow": {"rate": 60_000}}.get(fault, {})
    hub.fault(fault, CONTENT, "GET", times=1, **options)
    [report] = look(hub, "tester/style")
    assert said(report)["ranks"] == [16]


def test_a_server_that_ignores_ranges_is_not_read_to_the_end(hub: LocalHub) -> None:
    metadata = {"ss_tag_frequency": "x" * 300_000}
    hub.put("tester/style", {"a.safetensors": kohya(metadata=metadata, wide=4096, rank=128)})
    hub.fault("norange", CONTENT, "GET", times=99)
    [report] = look(hub, "tester/style")
    assert "ignores ranges" in str(report.error)
    assert "hubtool pull" in str(report.error.hint if report.error else "")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        framed(b"{}" + b" " * 7)[:9],
        (1 << 62).to_bytes(8, "little") + b"{}",
        framed(b"not json at all"),
        framed(b"[1]"),
    ],
    ids=["empty", "short", "cut", "endless header", "no json", "no object"],
)
def test_a_bad_header_is_reported_and_the_others_are_read(hub: LocalHub, data: bytes) -> None:
    hub.put("tester/style", {"bad.safetensors": data, "good.safetensors": kohya()})
    bad, good = look(hub, "tester/style")
    assert bad.state == "broken"
    assert bad.error is not None
    assert bad.error.exit_code == 7
    assert said(good)["kind"] == "lora"


def test_a_hostile_long_header_is_refused_or_read_never_obeyed(hub: LocalHub) -> None:
    chance = random.Random(5)
    base = bytearray(kohya(80, metadata={"a": "b" * 120_000}))
    files = {}
    for at in range(12):
        data = bytearray(base)
        for _ in range(40):
            data[chance.randrange(8, 230_000)] = chance.randrange(256)
        files[f"{at}.safetensors"] = bytes(data)
    hub.put("tester/style", files)
    for report in look(hub, "tester/style"):
        assert report.received <= BUDGET
        assert report.error is None or report.error.exit_code == 7


def test_a_pickle_is_listed_and_not_touched(hub: LocalHub) -> None:
    hub.put("tester/style", {"a.pt": b"\x80\x02."})
    [report] = look(hub, "tester/style")
    assert (report.state, report.received) == ("unread", 0)
    assert said(report)["kind"] == "unknown"
    assert not hub.log(CONTENT)


def test_a_peft_adapter_is_read_with_its_configuration(hub: LocalHub, tmp_path: Path) -> None:
    name = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": floats(4, 8), f"{name}.lora_B.weight": floats(8, 4)}
    config = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]})
    files = {"adapter_model.safetensors": safetensors_bytes(tensors), "adapter_config.json": config}
    hub.put("tester/peft", files)
    (tmp_path / "peft").mkdir()
    for file, content in files.items():
        (tmp_path / "peft" / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    local, [report] = inspect(tmp_path / "peft").to_json(), look(hub, "tester/peft")
    remote = said(report)
    assert {key: remote[key] for key in SAME} == {key: local[key] for key in SAME}
    assert remote["format"] == "peft-folder"


def test_what_the_library_has_costs_no_byte(hub: LocalHub, tmp_path: Path) -> None:
    known, new = kohya(), kohya(rank=8)
    hub.put("tester/style", {"known.safetensors": known, "new.safetensors": new})
    (tmp_path / "models").mkdir()
    (tmp_path / "models/mine.safetensors").write_bytes(known)
    with open_store() as store:
        scan(store, [str(tmp_path / "models")])
    index = index_remote("hf://tester/style", client=quick(hub))
    states = {file.entry.path: (file.state, file.received > 0) for file in index.files}
    assert states == {"known.safetensors": ("known", False), "new.safetensors": ("new", True)}
    assert {request["path"].rpartition("/")[2] for request in hub.log(CONTENT)} == {hashlib.sha256(new).hexdigest()}
    [report] = [file for file in index.files if file.id]
    assert report.places == (str(tmp_path / "models/mine.safetensors"),)
    assert said(report)["alphas"] == [2.0]  # the library read the values
    with open_store() as store:
        [origin] = hub_facts.origins(store)
    assert (origin.how, origin.path, origin.commit) == ("linked", "known.safetensors", hub.head("tester/style"))


def test_a_folder_a_revision_and_one_file_can_be_named(hub: LocalHub) -> None:
    first = hub.put("tester/style", {"a/one.safetensors": kohya()})
    hub.put("tester/style", {"b/two.safetensors": kohya(), "b/three.safetensors": kohya()})
    assert [file.entry.path for file in look(hub, f"tester/style@{first}")] == ["a/one.safetensors"]
    assert len(look(hub, "tester/style/b")) == 2
    assert len(look(hub, "tester/style/b/two.safetensors")) == 1
    with pytest.raises(NotFound, match="no weights"):
        look(hub, "tester/style/c")


def test_a_gated_repository_is_listed_but_not_read(hub: LocalHub) -> None:
    hub.put("acme2/gated", {"a.safetensors": kohya()}, gated=True)
    [report] = look(hub, "acme2/gated")
    assert isinstance(report.error, HubError)
    assert "is gated" in report.error.message
    assert report.row()["sha256"] == hashlib.sha256(kohya()).hexdigest()


def test_the_commands_print_what_was_read(hub: LocalHub) -> None:
    hub.put("tester/style", {"a.safetensors": kohya(), "b.pt": b"x"})
    one = hub.run("inspect", "hf://tester/style/a.safetensors", "--json")
    assert one.returncode == 0, one.stderr
    assert json.loads(one.stdout)["hub"]["received"] > 0
    both = hub.run("scan", "hf://tester/style", "--json")
    document = json.loads(both.stdout)
    assert (document["new"], document["unread"]) == (1, 1)
    assert document["received"] == sum(file["received"] for file in document["files"])
    table = hub.run("scan", "hf://tester/style")
    assert "a.safetensors" in table.stdout
    assert "nothing was downloaded" in table.stderr
    text = hub.run("inspect", "hf://tester/style")
    assert "lora" in text.stdout
    assert hub.run("inspect", "hf://tester/nothing").returncode == 6


def test_a_broken_file_that_was_asked_for_ends_with_exit_code_7(hub: LocalHub) -> None:
    hub.put("tester/style", {"a.safetensors": framed(b"no header")})
    done = hub.run("inspect", "hf://tester/style/a.safetensors", "--json")
    assert done.returncode == 7
    assert json.loads(done.stdout)["error"]["code"] == "corrupt"
    assert hub.run("scan", "hf://tester/style").returncode == 3
