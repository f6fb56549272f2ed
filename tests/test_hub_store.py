"""What the library keeps about hubs, and how a library made before it knew hubs gets there."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config

from hubtool import resources
from hubtool.actions import catalogue
from hubtool.errors import SchemaOutdated
from hubtool.registry import browse, hashing, hub_store, schema
from hubtool.registry.fast import FastReader
from hubtool.registry.hub_store import Answer, Card, Claims, Origin, PublishedFile, Receipt
from hubtool.registry.query import parse
from hubtool.registry.records import FileStat, HashResult
from hubtool.registry.store import Store
from tests.support.library import add, add_root, artifact_of, new_file, tag

SHA = "ab" * 32
COMMIT = "c" * 40
HUB = "https://hub.example"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "library.sqlite3"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store.open(path) as opened:
        yield opened


@pytest.fixture
def key(store: Store) -> int:
    add(store, new_file(add_root(store), b"a.safetensors", 1))
    return artifact_of(store, b"a.safetensors")


def origin(**changed: object) -> Origin:
    facts: dict[str, object] = {
        "endpoint": HUB,
        "repo": "o/n",
        "path": "a.safetensors",
        "commit": COMMIT,
        "how": "pulled",
    }
    return Origin(**{**facts, "sha256": SHA, "at": 7, **changed})  # type: ignore[arg-type]


def test_an_origin_is_read_back_as_it_was_written(store: Store, key: int) -> None:
    hub_store.record_origin(store, key, origin(etag="e", size=12))
    assert hub_store.origins(store, artifact=key) == [origin(etag="e", size=12, artifact=key)]
    assert hub_store.origins(store, repo="other/repo") == []


def test_a_newer_statement_about_the_same_file_replaces_the_older(store: Store, key: int) -> None:
    hub_store.record_origin(store, key, origin())
    hub_store.record_origin(store, key, origin(commit="d" * 40))
    hub_store.record_origin(store, key, origin(revision="v1"))
    found = [(known.commit[0], known.revision) for known in hub_store.origins(store)]
    assert found == [("d", "main"), ("c", "v1")]


def test_what_the_hub_says_of_a_hash_is_a_claim_of_the_hub(store: Store, key: int) -> None:
    hub_store.record_origin(store, key, origin())
    assert browse.hashes(store, key) == {"hub": {"sha256": SHA}}


def test_origins_name_the_file_as_a_ref() -> None:
    assert origin().ref == "hf://o/n/a.safetensors"
    assert origin(revision="v1").ref == "hf://o/n@v1/a.safetensors"


def test_a_card_keeps_its_facts_and_gives_its_trigger_words(store: Store, key: int) -> None:
    facts = Card(
        HUB, "o/n", COMMIT, "other", "mine", "LICENSE", ("a/b", "c/d"), "adapter", ("sks dog", "oil"), "---", 7
    )
    hub_store.record_card(store, facts, [key])
    hub_store.record_card(store, facts, [key])
    assert hub_store.card(store, HUB, "o/n") == facts
    assert hub_store.card(store, "https://other", "o/n") is None
    assert browse.by_key(store, key).trigger_words == ("sks dog", "oil")


def test_trigger_words_of_one_source_leave_those_of_another(store: Store, key: int) -> None:
    said = [("hub", ("one",)), ("civitai", ("two", "two", "")), ("hub", ("three",))]
    hub_store.record_claims(store, [Claims(key, source, words, {"blake3": "ab"}) for source, words in said])
    assert set(browse.by_key(store, key).trigger_words) == {"two", "three"}
    assert browse.hashes(store, key) == {"hub": {"blake3": "ab"}}


def test_a_receipt_is_read_back_and_makes_published_origins(store: Store, key: int) -> None:
    files = (PublishedFile("README.md", "cd" * 32, 5, "oid"), PublishedFile("a.safetensors", SHA, 9, None, key))
    receipt = Receipt(HUB, "o/n", COMMIT, files, parent_commit="p", card="# x", card_sha256="s", at=7)
    hub_store.record_receipt(store, receipt)
    assert hub_store.last_receipt(store, HUB, "o/n") == receipt
    assert hub_store.receipts(store) == [receipt]
    assert [(known.how, known.path) for known in hub_store.origins(store, artifact=key)] == [
        ("published", "a.safetensors")
    ]


def test_the_last_receipt_is_the_newest_of_its_revision(store: Store) -> None:
    for commit, revision in (("1", "main"), ("2", "main"), ("3", "next")):
        hub_store.record_receipt(store, Receipt(HUB, "o/n", commit, (), revision))
    newest, of_main, elsewhere = (
        hub_store.last_receipt(store, HUB, "o/n"),
        hub_store.last_receipt(store, HUB, "o/n", "main"),
        hub_store.last_receipt(store, HUB, "o/x"),
    )
    assert (newest and newest.commit, of_main and of_main.commit, elsewhere) == ("3", "2", None)


def test_artifacts_are_found_by_the_hash_a_listing_gives(store: Store, key: int) -> None:
    hashing.record(store, [HashResult(1, FileStat(100, 5, 1, 1), {"sha256": SHA})])
    wanted = [f"{number:064x}" for number in range(900)]
    assert hub_store.artifacts_by_sha256(store, [*wanted, SHA.upper()]) == {SHA: key}


def test_an_unknown_to_civitai_keeps_what_was_known_before(store: Store) -> None:
    hub_store.record_answers(store, [Answer(SHA, "s", 200, b'{"id": 1}', 10, 20)])
    hub_store.record_answers(store, [Answer(SHA, "s", 404, None, 30, 40)])
    found = hub_store.answers(store, [SHA])[SHA]
    assert (found.status, found.fetched_at, found.document) == (404, 30, {"id": 1})


def test_civitai_answers_are_kept_byte_for_byte(store: Store) -> None:
    body = b'{"id":  1, "name": "\\u00e9", "id": 2}'
    hub_store.record_answers(store, [Answer(SHA, "s", 200, body, 10, 20)])
    assert hub_store.answers(store, [SHA])[SHA].body == body


def test_hub_facts_follow_when_two_artifacts_turn_out_to_be_one(store: Store) -> None:
    root = add_root(store)
    add(store, new_file(root, b"a", 1), new_file(root, b"b", 2))
    first, second = artifact_of(store, b"a"), artifact_of(store, b"b")
    hashing.record(store, [HashResult(1, FileStat(100, 5, 1, 1), {"sha256": SHA})])
    hub_store.record_origin(store, second, origin())
    hub_store.record_receipt(store, Receipt(HUB, "o/m", COMMIT, (PublishedFile("b", SHA, 1, None, second),)))
    hashing.record(store, [HashResult(2, FileStat(100, 5, 2, 1), {"sha256": SHA})])
    assert [known.repo for known in hub_store.origins(store, artifact=first)] == ["o/n", "o/m"]
    assert hub_store.receipts(store)[0].files[0].artifact == first


def test_the_fast_reader_reads_hub_facts_too(store: Store, path: Path, key: int) -> None:
    hub_store.record_origin(store, key, origin())
    hub_store.record_card(store, Card(HUB, "o/n", COMMIT), [key])
    hub_store.record_receipt(store, Receipt(HUB, "o/n", COMMIT, ()))
    hub_store.record_answers(store, [Answer(SHA, "s", 200, b"{}", 1, 2)])
    with FastReader(path) as fast:
        assert hub_store.origins(fast) == hub_store.origins(store)
        assert hub_store.card(fast, HUB, "o/n") == hub_store.card(store, HUB, "o/n")
        assert hub_store.receipts(fast) == hub_store.receipts(store)
        assert hub_store.answers(fast, [SHA]) == hub_store.answers(store, [SHA])


def first_schema(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library as the first release made it, with a file, its tags and its hashes."""

    def only_the_first(connection: object) -> None:
        config = Config()
        config.set_main_option("script_location", str(resources.migrations()))
        config.set_main_option("path_separator", "os")
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")

    with monkeypatch.context() as patched:
        patched.setattr(schema, "_migrate", only_the_first)
        patched.setattr(schema.settings, "SCHEMA_VERSION", 1)
        with Store.open(path) as store:
            add(store, new_file(add_root(store), b"a.safetensors", 1, kind="lora", trigger_words=("sks",)))
            hashing.record(store, [HashResult(1, FileStat(100, 5, 1, 1), {"sha256": SHA})])
            tag(store, artifact_of(store, b"a.safetensors"), ["mine"], title="Mine", notes="good")


def contents(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """Every row of every table that the first schema had."""
    connection = sqlite3.connect(path)
    names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    later = {"alembic_version", "journal", "journal_step", "civitai_answer"}
    kept = [name for name in names if name not in later and not name.startswith(("hub_", "publication"))]
    return {name: connection.execute(f"SELECT * FROM {name} ORDER BY 1, 2").fetchall() for name in kept}


def test_a_library_of_the_first_schema_is_refused_with_the_next_step(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_schema(path, monkeypatch)
    for attempt in (lambda: Store.open(path), lambda: FastReader(path)):
        with pytest.raises(SchemaOutdated) as caught:
            attempt()
        assert caught.value.hint == "hubtool db upgrade"


def test_the_upgrade_of_a_library_of_the_first_schema_keeps_everything(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_schema(path, monkeypatch)
    before = contents(path)
    with Store.unchecked(path) as store:
        assert schema.upgrade(store.engine, store.path) == ("0001", "0002")
        assert schema.check(store.engine, store.path).ok
    assert contents(path) == before
    assert len(schema.backups(path)) == 1
    with FastReader(path) as fast:
        row = catalogue.ls(fast)[0]
        assert (row["sha256"], row["tags"], row["trigger_words"]) == (SHA, ["mine"], ["sks"])
        assert [found.id for found in browse.select(fast, parse("tag:mine"))] == [row["id"]]


def test_an_upgraded_library_takes_hub_facts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_schema(path, monkeypatch)
    with Store.unchecked(path) as store:
        schema.upgrade(store.engine, store.path)
    with Store.open(path) as store:
        hub_store.record_origin(store, artifact_of(store, b"a.safetensors"), origin())
        assert schema.check(store.engine, store.path).ok


def test_the_second_migration_can_be_taken_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_schema(path, monkeypatch)
    before = contents(path)
    with Store.unchecked(path) as store:
        schema.upgrade(store.engine, store.path)
        with store.transaction() as connection:
            config = Config()
            config.set_main_option("script_location", str(resources.migrations()))
            config.set_main_option("path_separator", "os")
            config.attributes["connection"] = connection
            command.downgrade(config, "0001")
    assert contents(path) == before
