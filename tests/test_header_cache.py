"""Headers read from afar are read once: kept by hash, bounded, private, and never in the way."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubtool.actions.remote import RemoteReport, index_remote, inspect_remote
from hubtool.hub.client import Client
from hubtool.hub.header_cache import HeaderCache, cache_folder
from tests.support.files import floats, safetensors_bytes, zeros
from tests.support.pulling import lora

if TYPE_CHECKING:
    from tests.support.hub import LocalHub  # pytest_plugins imports it first

pytest_plugins = ["tests.support.hub"]

CONTENT = r"/get/|/xorb/|/resolve/"
DIGEST = "ab" * 32


def look(hub: LocalHub, text: str = "tester/style", **options: Any) -> list[RemoteReport]:
    return inspect_remote(text, client=Client(hub.url, sleep=lambda _: None), **options)


def requests(hub: LocalHub) -> int:
    found = len(hub.log(CONTENT))
    hub.requests.clear()
    return found


def test_a_file_is_not_read_twice(hub_both: LocalHub) -> None:
    hub_both.upload("tester/style", {"a.safetensors": lora(), "b.safetensors": lora(3)})
    first = look(hub_both)
    assert requests(hub_both) > 0
    second = look(hub_both)
    assert requests(hub_both) == 0
    assert [report.received for report in second] == [0, 0]
    assert [report.state for report in second] == ["new", "new"]
    assert [report.document for report in second] == [report.document for report in first]


def test_the_same_bytes_elsewhere_are_known_too(hub: LocalHub) -> None:
    hub.put("tester/style", {"a.safetensors": lora()})
    hub.put("tester/copy", {"other/name.safetensors": lora()})
    look(hub)
    requests(hub)
    index = index_remote("hf://tester/copy", client=Client(hub.url))
    assert requests(hub) == 0
    assert index.received == 0
    assert index.files[0].state == "new"


def test_refresh_reads_again(hub: LocalHub) -> None:
    hub.put("tester/style", {"a.safetensors": lora()})
    look(hub)
    requests(hub)
    assert look(hub, refresh=True)[0].received > 0
    assert requests(hub) > 0
    assert look(hub)[0].received == 0


def test_a_header_longer_than_the_budget_is_kept_as_far_as_it_was_read(hub: LocalHub) -> None:
    tensors = {f"some.long.name.of.a.tensor.number.{at:05}.weight": zeros("BF16", at % 7 + 1, 3) for at in range(4000)}
    hub.put("tester/style", {"a.safetensors": safetensors_bytes(tensors)})
    [first] = look(hub)
    requests(hub)
    [second] = look(hub)
    assert requests(hub) == 0
    assert first.document == second.document
    assert second.document
    assert "header-partial" in {finding["code"] for finding in second.document["findings"]}


def test_the_configuration_of_a_peft_adapter_is_kept_with_it(hub: LocalHub) -> None:
    name = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": floats(4, 8), f"{name}.lora_B.weight": floats(8, 4)}
    config = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]})
    hub.put("tester/style", {"adapter_model.safetensors": safetensors_bytes(tensors), "adapter_config.json": config})
    [first] = look(hub)
    requests(hub)
    [second] = look(hub)
    assert requests(hub) == 0
    assert first.document == second.document
    assert second.document
    assert second.document["format"] == "peft-folder"
    data = config.encode()
    HeaderCache().put(hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), b'{"peft_type": "other"}')
    assert look(hub)[0].document == first.document  # it is checked against its hash


def test_a_broken_file_is_not_kept(hub: LocalHub) -> None:
    hub.put("tester/style", {"a.safetensors": b"\x10\0\0\0\0\0\0\0not json at all!" + bytes(100)})
    assert look(hub)[0].state == "broken"
    requests(hub)
    assert look(hub)[0].state == "broken"
    assert requests(hub) > 0


@pytest.mark.parametrize("damage", [b"", b"nothing", b"\x78\x9c" + bytes(30)])
def test_damage_to_the_cache_is_read_over(hub: LocalHub, damage: bytes) -> None:
    hub.put("tester/style", {"a.safetensors": lora()})
    look(hub)
    [kept] = (cache_folder() / "headers").glob("*.header")
    kept.write_bytes(damage)
    [report] = look(hub)
    assert (report.state, report.received > 0) == ("new", True)
    assert look(hub)[0].received == 0


def test_another_header_in_the_cache_than_fits_the_file_is_not_believed(hub: LocalHub) -> None:
    hub.put("tester/style", {"a.safetensors": lora()})
    digest = hashlib.sha256(lora()).hexdigest()
    HeaderCache().put(digest, (5000).to_bytes(8, "little") + b"{" * 5000)
    [report] = look(hub)
    assert (report.state, report.received > 0) == ("new", True)


def test_a_cache_that_cannot_be_written_changes_nothing(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HUBTOOL_CACHE", str(tmp_path / "file"))
    hub.put("tester/style", {"a.safetensors": lora()})
    assert [look(hub)[0].received > 0 for _ in range(2)] == [True, True]


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    cache = HeaderCache(tmp_path / "cache")
    cache.put(DIGEST, b"of a private repository")
    [kept] = cache.folder.iterdir()
    assert stat.S_IMODE(os.stat(cache.folder).st_mode) == 0o700
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = HeaderCache(tmp_path)
    digests = [f"{at:064x}" for at in range(8)]
    for at, digest in enumerate(digests):
        cache.put(digest, os.urandom(1000))
        os.utime(cache.folder / f"{digest}.header", (at, at))
    assert cache.get(digests[0])  # used just now
    cache.trim(4500)
    assert [bool(cache.get(digest)) for digest in digests] == [True, *[False] * 4, *[True] * 3]


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "AB" * 32, "ab" * 31, "ab" * 40, "/" * 64])
def test_what_is_no_digest_names_no_file(tmp_path: Path, digest: str) -> None:
    cache = HeaderCache(tmp_path)
    cache.put(digest, b"x")
    assert cache.get(digest) is None
    assert not list(tmp_path.rglob("*.header"))


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=1, max_size=4000), st.binary(max_size=4000))
def test_what_is_put_in_comes_out(tmp_path_factory: pytest.TempPathFactory, head: bytes, tail: bytes) -> None:
    cache = HeaderCache(tmp_path_factory.mktemp("cache"))
    cache.put(DIGEST, head, tail)
    assert HeaderCache(cache.folder.parent).get(DIGEST) == (head, tail)


def test_the_commands_read_once_unless_told(hub: LocalHub) -> None:
    hub.put("tester/style", {"a.safetensors": lora()})
    read = [
        json.loads(hub.run(*command, "--json").stdout)["received"]
        for command in (("scan", "hf://tester/style"), ("scan", "hf://tester/style"), ("scan", "hf://tester/style", "--refresh"))
    ]  # fmt: skip
    assert [one > 0 for one in read] == [True, False, True]
    again = json.loads(hub.run("inspect", "hf://tester/style/a.safetensors", "--json").stdout)
    assert again["hub"]["received"] == 0
