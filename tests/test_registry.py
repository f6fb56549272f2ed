"""The library's own behaviour: identity, merging, moving, hashes, lineage, references."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hubtool.errors import AmbiguousRef, NotFound, UsageProblem
from hubtool.registry import browse, hashing, lineage, scanning, schema
from hubtool.registry.records import FileStat, HashResult, LocationRecord, RootRecord
from hubtool.registry.store import Store
from hubtool.registry.text import clean, display, fold, new_uid, signed64
from hubtool.types import Finding
from tests.support.library import add, add_root, artifact_of, new_file, tag

SHA = {"a": "aa" * 32, "b": "bb" * 32}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "library.sqlite3") as opened:
        yield opened
        assert schema.check(opened.engine, opened.path).ok


@pytest.fixture
def root(store: Store) -> RootRecord:
    return add_root(store)


def location_id(store: Store, name: bytes) -> int:
    return next(place.id for place in browse.places(store) if place.raw.endswith(b"/" + name))


def hash_it(store: Store, name: bytes, sha256: str, *, inode: int, mtime_ns: int = 5) -> bool:
    result = HashResult(location_id(store, name), FileStat(100, mtime_ns, inode, 1), {"sha256": sha256})
    return hashing.record(store, [result])[0]


def test_a_written_file_comes_back_as_it_was(store: Store, root: RootRecord) -> None:
    facts = {
        "kind": "lora",
        "family": "sdxl",
        "dtypes": ("F16",),
        "rank": 8,
        "alpha": 4.0,
        "trigger_words": ("a", "b"),
        "title": "T\0x\ud800",
    }
    add(store, new_file(root, b"x.safetensors", 7, **facts, findings=(Finding("c", "warning", "m"),)))
    row = browse.find(store, "/models/x.safetensors")
    assert (row.kind, row.family, row.dtypes, row.rank, row.alpha, row.trigger_words) == (
        "lora",
        "sdxl",
        ("F16",),
        8,
        4.0,
        ("a", "b"),
    )
    assert row.title == "T x?"
    assert browse.findings(store, row.key) == [{"code": "c", "severity": "warning", "message": "m", "source": "scan"}]


def test_names_that_are_no_text_keep_their_bytes(store: Store, root: RootRecord) -> None:
    add(store, new_file(root, b"d/\xff\n\xfe.safetensors", 1))
    (place,) = browse.places(store)
    assert place.raw == b"/models/d/\xff\n\xfe.safetensors"
    assert os.fsencode(place.path) == place.raw


def test_inodes_of_64_bits_are_kept(store: Store, root: RootRecord) -> None:
    add(store, new_file(root, b"x", 2**64 - 1))
    (row,) = scanning.known(store, root.id)
    assert row.stat.inode == -1 == signed64(2**64 - 1)


def test_writing_the_same_file_twice_changes_nothing(store: Store, root: RootRecord) -> None:
    file = new_file(root, b"x", 1)
    assert add(store, file) == ["added"]
    assert add(store, file) == ["unchanged"]
    assert len(browse.places(store)) == 1


def test_hard_links_are_one_artifact_in_two_places(store: Store, root: RootRecord) -> None:
    assert add(store, new_file(root, b"x", 1), new_file(root, b"y", 1)) == ["added", "added"]
    assert artifact_of(store, b"x") == artifact_of(store, b"y")


def test_equal_looks_are_not_equal_bytes_until_hashed(store: Store, root: RootRecord) -> None:
    add(store, new_file(root, b"x", 1, quick_id="same"), new_file(root, b"y", 2, quick_id="same"))
    assert artifact_of(store, b"x") != artifact_of(store, b"y")
    assert hash_it(store, b"x", SHA["a"], inode=1)
    assert hash_it(store, b"y", SHA["a"], inode=2)
    assert artifact_of(store, b"x") == artifact_of(store, b"y")
    assert store.rows("SELECT COUNT(*) FROM artifact") == [(1,)]


def test_merging_a_stand_in_keeps_what_the_user_said(store: Store, root: RootRecord) -> None:
    add(store, new_file(root, b"x", 1), new_file(root, b"y", 2), new_file(root, b"z", 3))
    tag(store, artifact_of(store, b"x"), ["one"], title="kept", notes="first")
    tag(store, artifact_of(store, b"y"), ["one", "two"], title="other", notes="second")
    lineage.record(
        store, artifact_of(store, b"z"), [lineage.Parent("y", artifact_of(store, b"y"))], "convert", {}, "test"
    )
    hash_it(store, b"x", SHA["a"], inode=1)
    hash_it(store, b"y", SHA["a"], inode=2)
    key = artifact_of(store, b"y")
    assert browse.by_key(store, key).tags == ("one", "two")
    assert browse.notes(store, key) == {"title": "kept", "notes": "first\nsecond", "rating": None, "favorite": 0}
    assert [edge["op"] for edge in browse.lineage(store, key)["children"]] == ["convert"]


def test_user_data_of_a_stand_in_goes_to_a_known_artifact_without_any(store: Store, root: RootRecord) -> None:
    add(store, new_file(root, b"x", 1), new_file(root, b"y", 2))
    tag(store, artifact_of(store, b"y"), ["mine"])
    hash_it(store, b"x", SHA["a"], inode=1)
    hash_it(store, b"y", SHA["a"], inode=2)
    assert browse.by_key(store, artifact_of(store, b"x")).tags == ("mine",)


def test_other_bytes_behind_the_same_looks_become_another_artifact(store: Store, root: RootRecord) -> None:
    add(store, new_file(root, b"x", 1, title="T", trigger_words=("w",)))
    tag(store, artifact_of(store, b"x"), ["mine"])
    hash_it(store, b"x", SHA["a"], inode=1)
    before = artifact_of(store, b"x")
    scanning.touch(store, [(scanning.known(store, root.id)[0], FileStat(100, 6, 1, 1))])
    hash_it(store, b"x", SHA["b"], inode=1, mtime_ns=6)
    after = browse.by_key(store, artifact_of(store, b"x"))
    assert after.key != before
    assert (after.sha256, after.title, after.tags, after.trigger_words) == (SHA["b"], "T", ("mine",), ("w",))
    assert browse.by_key(store, before).sha256 == SHA["a"]


def test_a_hash_of_a_file_that_changed_meanwhile_is_dropped(store: Store, root: RootRecord) -> None:
    add(store, new_file(root, b"x", 1))
    assert not hash_it(store, b"x", SHA["a"], inode=1, mtime_ns=6)
    assert hashing.queued_bytes(store) == (1, 100)


def test_the_queue_gives_small_files_first_and_leaves_unreadable_ones_out(store: Store, root: RootRecord) -> None:
    add(
        store,
        new_file(root, b"big", 1, size=900),
        new_file(root, b"small", 2, size=3),
        new_file(root, b"bad", 3, health="unreadable"),
    )
    assert [place.size for place in hashing.queue(store)] == [3, 900]
    assert [place.size for place in hashing.queue(store, after=(3, location_id(store, b"small")))] == [900]


def test_a_file_rewritten_in_place_is_a_new_artifact_that_inherits_the_user_data(
    store: Store, root: RootRecord
) -> None:
    add(store, new_file(root, b"x", 1))
    old = artifact_of(store, b"x")
    tag(store, old, ["mine"])
    assert add(store, new_file(root, b"x", 2)) == ["changed"]
    new = artifact_of(store, b"x")
    assert new != old
    assert browse.by_key(store, new).tags == ("mine",)
    assert browse.by_key(store, old).tags == ()


def test_two_files_can_swap_their_names(store: Store, root: RootRecord) -> None:
    add(store, new_file(root, b"x", 1), new_file(root, b"y", 2))
    first, second = sorted(scanning.known(store, root.id), key=lambda row: row.relpath)
    swapped = [(first, LocationRecord(root.id, b"y", first.stat)), (second, LocationRecord(root.id, b"x", second.stat))]
    scanning.move(store, swapped)
    assert artifact_of(store, b"y") == first.artifact_id
    assert artifact_of(store, b"x") == second.artifact_id


def test_a_missing_file_that_turns_up_elsewhere_keeps_its_row(store: Store, root: RootRecord) -> None:
    add(store, new_file(root, b"x", 1))
    scanning.set_states(store, [location_id(store, b"x")], "missing")
    assert add(store, new_file(root, b"sub/y", 9, quick_id="q1")) == ["moved"]
    assert store.rows("SELECT COUNT(*) FROM location") == [(1,)]


def test_a_copy_of_a_file_that_is_there_is_not_a_move(store: Store, root: RootRecord) -> None:
    add(store, new_file(root, b"x", 1))
    assert add(store, new_file(root, b"y", 2, quick_id="q1")) == ["added"]


def test_single_files_go_over_to_the_root_that_covers_them(store: Store) -> None:
    small = scanning.add_root(store, b"/models/sub", 1, 2, walked=False)
    add(store, new_file(small, b"x", 1))
    big = add_root(store)
    scanning.absorb(store, big)
    assert [place.raw for place in browse.places(store)] == [b"/models/sub/x"]
    assert [root.path for root in scanning.roots(store)] == [b"/models"]


def test_lineage_tells_parents_and_children(store: Store, root: RootRecord) -> None:
    add(store, new_file(root, b"a", 1), new_file(root, b"b", 2), new_file(root, b"mix", 3))
    child, first = artifact_of(store, b"mix"), artifact_of(store, b"a")
    parents = [lineage.Parent("a", first, 0.7), lineage.Parent(SHA["b"], None, 0.3)]
    for _ in range(2):  # recorded again, it is not doubled
        lineage.record(store, child, parents, "merge", {"method": "svd"}, "hubtool 1")
    edges = browse.lineage(store, child)["parents"]
    assert [(edge["ref"], edge["strength"], edge["params"]) for edge in edges] == [
        ("a", 0.7, {"method": "svd"}),
        (SHA["b"], 0.3, {"method": "svd"}),
    ]
    assert [edge["id"] for edge in browse.lineage(store, first)["children"]] == [browse.by_key(store, child).id]


def test_a_reference_is_a_path_an_id_or_a_hash_prefix(store: Store, root: RootRecord) -> None:
    add(
        store, new_file(root, b"x", 1), new_file(root, b"y", 2, embedded_hashes={"payload_sha256": "cafe01" + "0" * 58})
    )
    hash_it(store, b"x", SHA["a"], inode=1)
    wanted = browse.find(store, "/models/x")
    assert browse.find(store, wanted.id) == wanted
    assert browse.find(store, wanted.id[:6].upper()) == wanted
    assert browse.find(store, "AAAAAA") == wanted
    assert browse.find(store, "cafe01").places[0].raw == b"/models/y"


@pytest.mark.parametrize("ref", ["aaaaa", "nothing", "/models/none", "a\0b", "deadbeef"])
def test_a_reference_to_nothing_is_not_found(store: Store, root: RootRecord, ref: str) -> None:
    add(store, new_file(root, b"x", 1))
    hash_it(store, b"x", SHA["a"], inode=1)
    with pytest.raises(NotFound):
        browse.find(store, ref)


def test_an_ambiguous_reference_lists_the_choices(store: Store, root: RootRecord) -> None:
    add(store, new_file(root, b"x", 1), new_file(root, b"y", 2))
    hash_it(store, b"x", "abcdef" + "0" * 58, inode=1)
    hash_it(store, b"y", "abcdef" + "1" * 58, inode=2)
    with pytest.raises(AmbiguousRef, match="/models/x"):
        browse.find(store, "abcdef")
    with pytest.raises(UsageProblem):
        browse.find(store, "")


def test_ids_never_look_like_hashes() -> None:
    ids = {new_uid() for _ in range(500)}
    assert len(ids) == 500
    assert not any(set(uid[:1]) <= set("0123456789abcdef") for uid in ids)


def test_text_is_folded_the_same_however_it_was_typed() -> None:
    assert fold("É") == fold("é") == fold("e\u0301")
    assert fold("STRASSE") == fold("straße")
    assert clean("a\0\ud800") == "a ?"
    assert display(b"\xff.pt") == "�.pt"
