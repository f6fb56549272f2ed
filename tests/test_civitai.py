"""Civitai by hash, against a server on loopback: batches, faults, the negative cache, and what is believed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hubtool.actions import civitai as action
from hubtool.actions.scan import scan
from hubtool.errors import HubError, PartialFailure, UsageProblem
from hubtool.hub import civitai
from hubtool.hub.civitai import Civitai, Pace
from hubtool.registry import browse, hub_facts
from hubtool.registry.store import Store
from hubtool.tensors.strict_json import JsonError
from tests.support.civitai_server import CivitaiServer, civitai_server
from tests.support.files import floats, write_safetensors

DAY = action.DAY


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def server() -> Iterator[CivitaiServer]:
    with civitai_server() as running:
        yield running


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def client(server: CivitaiServer, clock: Clock) -> Civitai:
    return Civitai(server.url, pace=Pace(civitai.PER_SECOND, clock, clock.sleep))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A library of three small LoRAs."""
    for number in range(3):
        lora(tmp_path / "models" / f"style{number}.safetensors", number)
    with Store.open(tmp_path / "library.sqlite3") as opened:
        scan(opened, [str(tmp_path / "models")])
        yield opened


def lora(path: Path, number: int, **metadata: str) -> Path:
    down, up = (
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight",
    )
    return write_safetensors(path, {down: floats(2, 4, start=number), up: floats(4, 2, start=number)}, metadata)


def digests(store: Store) -> list[str]:
    return [row[0] for row in store.rows("SELECT sha256 FROM artifact ORDER BY id")]


def lookup(store: Store, client: Civitai, clock: Clock, *refs: str, **options: bool) -> action.Lookup:
    return action.look_up(store, refs, client=client, clock=clock, **options)  # type: ignore[arg-type]


def statuses(found: action.Lookup) -> list[str]:
    return [one.status for one in found.found]


def sha(number: int) -> str:
    return f"{number:064x}"


def test_a_file_is_known_by_its_hash(store: Store, server: CivitaiServer, client: Civitai, clock: Clock) -> None:
    server.add(digests(store)[1], 7)
    found = lookup(store, client, clock)
    assert found.counts == {"known": 1, "unknown": 2, "unhashed": 0, "failed": 0}
    facts = next(one.facts for one in found.found if one.status == "known")
    assert facts is not None
    assert (facts.name, facts.version, facts.base_model, facts.creator) == ("Style 7", "v7.0", "SDXL 1.0", "someone")
    assert (facts.match, facts.page) == ("sha256", "https://civitai.com/models/1007?modelVersionId=7")
    assert facts.permissions["allowDerivatives"] is False


def test_trigger_words_and_hashes_become_claims_of_civitai(
    store: Store, server: CivitaiServer, client: Civitai, clock: Clock
) -> None:
    server.add(digests(store)[0], 7)
    lookup(store, client, clock)
    row = browse.find(store, digests(store)[0])
    assert row.trigger_words == ("word 7", "sks dog")
    assert browse.hashes(store, row.key)["hub"]["blake3"] == "b3" * 32


def test_one_request_asks_for_many_files(store: Store, server: CivitaiServer, client: Civitai, clock: Clock) -> None:
    lookup(store, client, clock)
    assert [(method, len(hashes)) for method, _, hashes in server.requests] == [("POST", 3)]


def test_batches_hold_at_most_a_hundred_hashes_and_are_spaced_out(
    server: CivitaiServer, client: Civitai, clock: Clock
) -> None:
    wanted = [sha(number) for number in range(250)]
    for digest in wanted[::2]:
        server.add(digest)
    known = [version.document for _, versions in client.versions(wanted) for version in versions]
    assert [len(hashes) for _, _, hashes in server.requests] == [100, 100, 50]
    assert len(known) == 125
    assert clock.slept == pytest.approx([0.5, 0.5])


def test_a_batch_that_is_too_large_is_split(server: CivitaiServer, client: Civitai) -> None:
    server.largest_batch = 30
    wanted = [sha(number) for number in range(100)]
    for digest in wanted:
        server.add(digest)
    asked = [(len(batch), len(versions)) for batch, versions in client.versions(wanted)]
    assert asked == [(25, 25)] * 4


def test_no_token_and_nothing_but_hashes_is_sent(
    store: Store, server: CivitaiServer, client: Civitai, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "CIVITAI_TOKEN", "CIVITAI_API_KEY"):
        monkeypatch.setenv(name, "hf_sentinel")
    lookup(store, client, clock)
    sent = json.dumps([server.seen_headers, server.requests])
    assert "sentinel" not in sent
    assert "Authorization" not in sent
    assert "style" not in sent


def test_retry_after_is_obeyed_and_the_rate_halved(server: CivitaiServer, client: Civitai, clock: Clock) -> None:
    server.add(sha(1))
    server.fault("status", 2, 429, Retry_After="7")
    assert client.version(sha(1)) is not None
    assert clock.slept.count(7.0) == 2
    assert client.pace.interval == 4 / civitai.PER_SECOND


def test_retry_after_may_be_a_date() -> None:
    assert civitai.retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert civitai.retry_after("12") == 12.0
    assert civitai.retry_after("soon") is None
    assert civitai.retry_after(None) is None


def test_a_server_that_asks_for_a_long_pause_is_left_alone(
    server: CivitaiServer, client: Civitai, clock: Clock
) -> None:
    server.fault("status", 1, 429, Retry_After="3600")
    with pytest.raises(HubError, match="pause of 3600 seconds"):
        client.version(sha(1))
    assert sum(clock.slept) < 1


@pytest.mark.parametrize("kind", ["reset", "truncate", "short", "html"])
def test_what_breaks_once_is_asked_again(server: CivitaiServer, client: Civitai, kind: str) -> None:
    server.add(sha(1))
    server.fault(kind)
    assert [len(versions) for _, versions in client.versions([sha(1)])] == [1]
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_server_in_trouble_is_asked_again_and_then_given_up(
    server: CivitaiServer, client: Civitai, clock: Clock, status: int
) -> None:
    server.fault("status", 99, status)
    with pytest.raises(HubError, match=f"HTTP {status}") as caught:
        client.version(sha(1))
    assert len(server.requests) == civitai.TRIES
    assert caught.value.exit_code == 6


def test_nothing_that_is_no_answer_becomes_one(
    store: Store, server: CivitaiServer, client: Civitai, clock: Clock
) -> None:
    server.add(digests(store)[0])
    lookup(store, client, clock)
    clock.now += action.KNOWN_FOR
    server.fault("html", 99)
    found = lookup(store, client, clock)
    assert statuses(found) == ["failed"] * 3
    assert isinstance(found.failure, HubError)
    assert found.found[0].facts is not None  # what was known before stays known
    assert browse.find(store, digests(store)[0]).trigger_words == ("word 1", "sks dog")


def test_a_failure_after_some_batches_keeps_what_was_learnt(
    tmp_path: Path, server: CivitaiServer, client: Civitai, clock: Clock, monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    monkeypatch.setattr(civitai, "BATCH", 1)
    monkeypatch.setattr(server, "take_fault", _after_two(server))
    found = lookup(store, client, clock)
    assert sorted(statuses(found)) == ["failed", "unknown", "unknown"]
    with pytest.raises(PartialFailure):
        found.raise_failure()
    monkeypatch.undo()
    asked = len(server.requests)
    lookup(store, client, clock)
    assert len(server.requests[asked:][0][2]) == 1  # only what is missing


def _after_two(server: CivitaiServer) -> object:
    from tests.support.civitai_server import Fault

    return lambda: Fault("status", status=500) if len(server.requests) > 2 else None


def test_a_fresh_answer_is_not_asked_for_again(
    store: Store, server: CivitaiServer, client: Civitai, clock: Clock
) -> None:
    server.add(digests(store)[0])
    lookup(store, client, clock)
    again = lookup(store, client, clock)
    assert (len(server.requests), again.asked, again.counts["known"]) == (1, 0, 1)


def test_not_known_is_believed_for_a_week_and_known_for_a_month(
    store: Store, server: CivitaiServer, client: Civitai, clock: Clock
) -> None:
    server.add(digests(store)[0])
    lookup(store, client, clock)
    clock.now += 8 * DAY
    lookup(store, client, clock)
    clock.now += 23 * DAY
    lookup(store, client, clock)
    assert [len(hashes) for _, _, hashes in server.requests] == [3, 2, 3]


def test_refresh_asks_again(store: Store, server: CivitaiServer, client: Civitai, clock: Clock) -> None:
    lookup(store, client, clock)
    lookup(store, client, clock, refresh=True)
    assert len(server.requests) == 2


def test_a_version_that_is_unpublished_keeps_its_last_answer(
    store: Store, server: CivitaiServer, client: Civitai, clock: Clock
) -> None:
    server.add(digests(store)[0])
    lookup(store, client, clock)
    server.versions.clear()
    found = lookup(store, client, clock, refresh=True)
    assert statuses(found) == ["unknown"] * 3
    assert found.found[0].facts is not None
    assert browse.find(store, digests(store)[0]).trigger_words == ("word 1", "sks dog")


def test_the_raw_answer_is_kept(store: Store, server: CivitaiServer, client: Civitai, clock: Clock) -> None:
    served = server.add(digests(store)[0], extra={"field": "nobody knows"})
    lookup(store, client, clock)
    kept = hub_facts.answers(store, digests(store))[digests(store)[0]]
    assert kept.body == json.dumps(served).encode()


def test_a_version_that_names_another_hash_proves_nothing(
    store: Store, server: CivitaiServer, client: Civitai, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    liar = server.add(sha(1))
    monkeypatch.setattr(server, "by_sha256", lambda _wanted: [liar])
    assert statuses(lookup(store, client, clock)) == ["unknown"] * 3


def test_a_file_whose_header_was_edited_is_found_by_its_tensors(
    store: Store, server: CivitaiServer, client: Civitai, clock: Clock
) -> None:
    payload = store.rows("SELECT payload_sha256 FROM artifact ORDER BY id")[0][0]
    server.add(sha(1), autov3=payload[:12])
    assert lookup(store, client, clock).counts["known"] == 0
    found = lookup(store, client, clock, edited=True)
    assert found.counts["known"] == 1
    assert next(one.facts for one in found.found if one.facts).match == "autov3"  # type: ignore[union-attr]
    assert "hub" not in browse.hashes(store, found.found[0].row.key)  # those hashes are of the file before the edit


def test_unknown_tensors_are_believed_to_be_unknown_for_a_week_too(
    store: Store, server: CivitaiServer, client: Civitai, clock: Clock
) -> None:
    for passed, asked in ((0, 3), (1, 0), (7, 3)):
        clock.now += passed * DAY
        before = len(server.requests)
        lookup(store, client, clock, edited=True)
        assert sum(method == "GET" for method, _, _ in server.requests[before:]) == asked


def test_an_interruption_keeps_the_claims_of_what_was_answered(
    store: Store, server: CivitaiServer, client: Civitai, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(civitai, "BATCH", 1)
    for digest in digests(store):
        server.add(digest)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        action.look_up(store, client=client, clock=clock, progress=stop)
    assert sorted(len(browse.find(store, digest).trigger_words) for digest in digests(store)) == [0, 0, 2]


def test_refs_choose_what_is_asked(store: Store, server: CivitaiServer, client: Civitai, clock: Clock) -> None:
    found = lookup(store, client, clock, digests(store)[0][:12], digests(store)[0])
    assert len(found.found) == 1
    assert server.requests[0][2] == [digests(store)[0].upper()]


def test_a_file_without_a_hash_is_named_not_asked(
    tmp_path: Path, server: CivitaiServer, client: Civitai, clock: Clock
) -> None:
    lora(tmp_path / "a.safetensors", 1)
    with Store.open(tmp_path / "other.sqlite3") as store:
        scan(store, [str(tmp_path / "a.safetensors")], hashes=False)
        assert statuses(lookup(store, client, clock)) == ["unhashed"]
    assert server.requests == []


@pytest.mark.parametrize("status", [301, 307, 308])
def test_redirects_are_not_followed(server: CivitaiServer, client: Civitai, status: int) -> None:
    server.fault("redirect", 1, status, Location="https://elsewhere.example/api/v1/x")
    with pytest.raises(HubError, match=r"elsewhere\.example") as caught:
        next(iter(client.versions([sha(1)])))
    assert "HUBTOOL_CIVITAI=" in str(caught.value.hint)


def test_an_answer_without_end_is_cut_off(
    server: CivitaiServer, client: Civitai, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(sha(1))
    monkeypatch.setattr(civitai, "MAX_BODY", 100)
    with pytest.raises(HubError, match="larger"):
        client.version(sha(1))


@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b"3", b"[" * 100_000, b'{"id": 1', b"\xff"])
def test_what_is_no_answer_is_refused(body: bytes) -> None:
    with pytest.raises(JsonError):
        civitai.read(body)


def test_the_items_of_a_list_keep_their_own_bytes() -> None:
    items = [b'{"id": 1.50, "a": "]"}', b'{ "id":2 }']
    found = civitai.read(b" [ " + b" ,\n ".join(items) + b" ] ")
    assert [version.raw for version in found] == items
    assert civitai.read(b"[]") == []


@pytest.mark.parametrize(
    ("value", "on"), [("", False), ("0", False), ("off", False), ("1", True), ("http://h/api", True)]
)
def test_civitai_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch, value: str, on: bool) -> None:
    monkeypatch.setenv(civitai.SWITCH, value)
    assert civitai.enabled() is on


def test_the_address_may_be_named_and_must_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(civitai.SWITCH, "https://civitai.example/api/v1/")
    assert civitai.endpoint() == "https://civitai.example/api/v1"
    for wrong in ("file:///etc/passwd", "https://user:secret@host/api", "https:///x"):
        monkeypatch.setenv(civitai.SWITCH, wrong)
        with pytest.raises(UsageProblem) as caught:
            civitai.endpoint()
        assert "secret" not in str(caught.value)


def test_descriptions_are_plain_text_from_both_places(
    store: Store, server: CivitaiServer, client: Civitai, clock: Clock
) -> None:
    server.add(digests(store)[0])
    facts = lookup(store, client, clock).found[0].facts
    assert facts is not None
    assert facts.description == "Use at 0.8\n\nA style"
    assert (
        facts.description_html
        == '<p>Use at <strong>0.8</strong></p>\n<p>A <a rel="noopener noreferrer nofollow ugc">style</a></p>'
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"trainedWords": "not a list"},
        {"model": None, "creator": 3, "baseModel": {"a": 1}, "description": 5},
        {"trainedWords": [1, None, "", ", ", "x" * 10_000], "name": ["a"]},
        {"modelId": 10**400, "nsfwLevel": True},
    ],
)
def test_odd_answers_are_read_as_far_as_they_make_sense(
    store: Store, server: CivitaiServer, client: Civitai, clock: Clock, changed: dict[str, object]
) -> None:
    server.add(digests(store)[0], **changed)
    found = lookup(store, client, clock)
    assert found.counts["known"] == 1
    json.dumps(found.to_json())


def test_what_civitai_said_is_read_without_a_network(
    store: Store, server: CivitaiServer, client: Civitai, clock: Clock
) -> None:
    server.add(digests(store)[0])
    lookup(store, client, clock)
    server.close()
    first, second = (browse.find(store, digest) for digest in digests(store)[:2])
    facts = action.known(store, first)
    assert facts is not None
    assert facts.name == "Style 1"
    assert action.known(store, second) is None
