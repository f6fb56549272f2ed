"""Tags, titles, notes and ratings: said, taken back, carried to another library. ``tag``, ``set``, ``log``, ``undo``, ``export``, ``import``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hubtool.actions import exchange, undo
from hubtool.actions.choosing import choose
from hubtool.actions.curate import edit, split, split_tags
from hubtool.cli.main import cli
from hubtool.errors import CorruptFile, HubtoolError, NotFound, UsageProblem
from hubtool.registry import browse, curation, hashing, journal
from hubtool.registry.curation import Said
from hubtool.registry.query import parse
from hubtool.registry.records import FileStat, HashResult
from hubtool.registry.store import Store
from tests.support.library import add, add_root, new_file

NAMES = (b"a.safetensors", b"b.safetensors", b"c.safetensors")


def fill(store: Store, folder: bytes = b"/models") -> None:
    root = add_root(store, folder)
    add(
        store, *(new_file(root, name, at, kind="lora", family="sdxl" if at else "sd1") for at, name in enumerate(NAMES))
    )
    for place in browse.places(store):
        at = NAMES.index(place.raw.rpartition(b"/")[2])
        digest = {"sha256": f"{at}f" * 32, "payload_sha256": f"{at}e" * 32}
        hashing.record(store, [HashResult(place.id, FileStat(100, 5, at, 1), digest, f"{at}d" * 32)])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "library.sqlite3") as opened:
        fill(opened)
        yield opened


def said(store: Store, name: str) -> Said:
    row = browse.find(store, f"/models/{name}.safetensors")
    return curation.read(store, [row.key])[row.key]


def change(store: Store, *words: str) -> list[curation.Change]:
    chosen, assignments = split(words)
    return edit(store, chosen, assignments, "set")


def tag(store: Store, *words: str) -> list[curation.Change]:
    chosen, assignments = split_tags(words)
    return edit(store, chosen, assignments, "tag")


def test_tags_are_added_and_taken_off_by_query(store: Store) -> None:
    assert len(tag(store, "family:sdxl", "+Style", "+todo")) == 2
    assert len(tag(store, "family:sdxl", "name:b", "-TODO")) == 1
    assert (said(store, "a").tags, said(store, "b").tags, said(store, "c").tags) == ((), ("Style",), ("Style", "todo"))
    assert [row.places[0].path for row in browse.select(store, parse("tag:todo"))] == ["/models/c.safetensors"]


def test_a_tag_is_one_whatever_its_case(store: Store) -> None:
    tag(store, "/models/a.safetensors", "+Anime")
    assert tag(store, "/models/a.safetensors", "+anime") == []
    assert said(store, "a").tags == ("Anime",)


def test_fields_are_set_added_to_and_cleared(store: Store) -> None:
    change(store, "/models/a.safetensors", "title=My style", "notes=good", "rating=4", "favorite=yes", "tag+=x,y")
    assert said(store, "a") == Said("My style", "good", 4, True, ("x", "y"))
    change(store, "/models/a.safetensors", "notes+=at 0.8", "rating!", "favorite=no", "tag-=x", "title!")
    assert said(store, "a") == Said(None, "good\nat 0.8", None, False, ("y",))
    change(store, "/models/a.safetensors", "tag=z")
    assert said(store, "a").tags == ("z",)


def test_what_was_said_is_found_by_queries(store: Store) -> None:
    change(store, "/models/a.safetensors", "notes=Ganz Gut", "rating=5")
    for query in ("note:gut", "rating:5", "rating:>4", "has:note"):
        assert len(browse.select(store, parse(query))) == 1, query


def test_setting_what_is_so_already_changes_nothing(store: Store) -> None:
    change(store, "/models/a.safetensors", "rating=4")
    assert change(store, "/models/a.safetensors", "rating=4") == []
    assert len(journal.records(store)) == 1


@pytest.mark.parametrize(
    "words",
    [["colour=red"], ["rating=6"], ["rating=12"], ["rating+=1"], ["favorite=maybe"], ["title-=x"], ["tag+="], ["a"]],
)
def test_what_cannot_be_set_is_refused_before_anything_is(store: Store, words: list[str]) -> None:
    with pytest.raises(UsageProblem):
        change(store, "family:sdxl", *words)
    assert journal.records(store) == []


def test_an_unknown_field_names_the_nearest(store: Store) -> None:
    with pytest.raises(UsageProblem, match="did you mean 'rating'"):
        change(store, "family:sdxl", "ratng=4")


def test_a_query_that_finds_nothing_is_told(store: Store) -> None:
    with pytest.raises(NotFound, match="matches"):
        tag(store, "family:flux1", "+x")
    with pytest.raises(UsageProblem, match="which artifacts"):
        tag(store, "+x")


def test_refs_are_paths_ids_and_hashes_and_anything_else_is_a_query(store: Store) -> None:
    row = browse.find(store, "/models/a.safetensors")
    assert [found.key for found in choose(store, ["/models/a.safetensors", row.id, "0f0f0f0f"])] == [row.key]
    assert len(choose(store, ["safetensors"])) == 3
    assert len(choose(store, ["kind:lora", "-family:sd1"])) == 2
    with pytest.raises(NotFound):
        choose(store, [row.id[:3]])  # short words are words


def test_the_last_change_is_undone(store: Store) -> None:
    change(store, "family:sdxl", "rating=4", "tag+=x")
    change(store, "/models/b.safetensors", "rating=2")
    assert undo.undo(store).undone == 1
    assert said(store, "b").rating == 4
    assert undo.undo(store).undone == 2
    assert said(store, "b") == Said()
    with pytest.raises(NotFound, match="nothing to undo"):
        undo.undo(store)


def test_a_change_is_undone_by_its_id_unless_it_was_changed_again(store: Store) -> None:
    change(store, "family:sdxl", "rating=4")
    change(store, "/models/b.safetensors", "rating=2")
    first = journal.records(store)[-1].uid
    result = undo.undo(store, first[:6])
    assert (result.undone, len(result.left)) == (1, 1)
    assert "changed again since" in result.left[0]
    assert (said(store, "b").rating, said(store, "c").rating) == (2, None)
    with pytest.raises(HubtoolError, match="undone already"):
        undo.undo(store, first)


def test_undo_of_an_unknown_id_says_so(store: Store) -> None:
    with pytest.raises(NotFound):
        undo.undo(store, "zzz")


def test_the_log_lists_changes_newest_first(store: Store) -> None:
    tag(store, "family:sdxl", "+x")
    change(store, "/models/a.safetensors", "rating=1")
    undo.undo(store)
    rows = undo.log(store)
    assert [(row["command"], row["summary"], row["state"]) for row in rows] == [
        ("set", "set 1 artifacts", "undone"),
        ("tag", "tag 2 artifacts", "done"),
    ]


def test_a_change_and_its_journal_are_one_transaction(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(curation.journal, "write", fail)
    with pytest.raises(ZeroDivisionError):
        change(store, "family:sdxl", "rating=4")
    assert said(store, "b") == Said()


def exported(store: Store, *words: str, **options: Any) -> bytes:
    return b"\n".join(json.dumps(row).encode() for row in exchange.export(store, words, **options))


def test_what_was_said_survives_another_library_and_other_paths(store: Store, tmp_path: Path) -> None:
    change(store, "/models/a.safetensors", "title=Mine", "notes=ä\nb", "rating=3", "favorite=yes", "tag=x")
    content = exported(store)
    with Store.open(tmp_path / "other.sqlite3") as other:
        fill(other, b"/elsewhere")
        found = exchange.bring(other, content)
        row = browse.find(other, "/elsewhere/a.safetensors")
        assert curation.read(other, [row.key])[row.key] == Said("Mine", "ä\nb", 3, True, ("x",))
        assert (found.lines, len(found.changes), found.unmatched) == (3, 1, [])
        assert undo.undo(other).undone == 1
        assert curation.read(other, [row.key])[row.key] == Said()


def test_an_import_fills_what_is_empty_and_unites_tags(store: Store) -> None:
    change(store, "/models/a.safetensors", "title=Theirs", "rating=3", "notes=n", "tag=x")
    content = exported(store, said_only=True)
    change(store, "/models/a.safetensors", "title=Mine", "rating!", "notes!", "tag=y")
    exchange.bring(store, content)
    assert said(store, "a") == Said("Mine", "n", 3, False, ("x", "y"))
    exchange.bring(store, content, overwrite=True)
    assert said(store, "a") == Said("Theirs", "n", 3, False, ("x", "y"))


def test_an_import_finds_a_file_whose_header_was_edited(store: Store) -> None:
    line = {"sha256": "aa" * 32, "payload_sha256": "0e" * 32, "rating": 2}
    assert len(exchange.bring(store, json.dumps([line]).encode()).changes) == 1
    assert said(store, "a").rating == 2


def test_an_import_names_what_the_library_does_not_have(store: Store) -> None:
    found = exchange.bring(store, b'{"sha256": "aa", "path": "/x/y.safetensors", "rating": 2}\n\n')
    assert found.unmatched == ["/x/y.safetensors"]
    assert journal.records(store) == []


def test_a_dry_run_of_an_import_changes_nothing(store: Store) -> None:
    line = json.dumps({"sha256": "0f" * 32, "rating": 2}).encode()
    assert len(exchange.bring(store, line, dry_run=True).changes) == 1
    assert said(store, "a") == Said()


@pytest.mark.parametrize("content", [b"{", b"[1]", b"not json", b'{"title": "no hash"}', b"[" * 1000, b"\xff\xfe"])
def test_what_is_no_export_is_refused_whole(store: Store, content: bytes) -> None:
    good = json.dumps({"sha256": "0f" * 32, "rating": 2}).encode()
    with pytest.raises(CorruptFile):
        exchange.bring(store, good + b"\n" + content)
    assert said(store, "a") == Said()


@pytest.mark.parametrize(
    "wrong", [{"rating": 9}, {"rating": True}, {"title": 3}, {"tags": "x"}, {"tags": [1, " "]}, {"favorite": 1}]
)
def test_values_of_a_wrong_type_say_nothing(store: Store, wrong: dict[str, Any]) -> None:
    assert exchange.bring(store, json.dumps({"sha256": "0f" * 32, **wrong}).encode()).changes == []


@pytest.fixture
def library(store: Store) -> Path:
    assert store.path is not None
    return store.path


def hubtool(library: Path, *args: str, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(cli, ["--library", str(library), *args], input=stdin)


def test_tagging_on_the_command_line(library: Path, store: Store) -> None:
    done = hubtool(library, "tag", "family:sdxl", "-name:c", "+style", "--json")
    assert json.loads(done.stdout)["changed"] == 1
    assert said(store, "b").tags == ("style",)
    assert "tags: style -> " in hubtool(library, "tag", "/models/b.safetensors", "-style", "--dry-run").stdout
    assert said(store, "b").tags == ("style",)
    assert hubtool(library, "tag", "/models/b.safetensors", "-style").exit_code == 0
    assert said(store, "b").tags == ()


def test_words_that_look_like_short_options_are_words(library: Path, store: Store) -> None:
    tag(store, "/models/a.safetensors", "+photo", "+yes")
    assert hubtool(library, "tag", "/models/a.safetensors", "-photo", "-yes").exit_code == 0
    assert said(store, "a").tags == ()


def test_setting_and_undoing_on_the_command_line(library: Path, store: Store) -> None:
    assert hubtool(library, "set", "family:sdxl", "rating=4").exit_code == 0
    rows = json.loads(hubtool(library, "log", "--json").stdout)
    assert [row["command"] for row in rows] == ["set"]
    steps = json.loads(hubtool(library, "log", rows[0]["id"], "--json").stdout)
    assert [step["op"] for step in steps] == ["entry", "entry"]
    assert "set 2 artifacts" in hubtool(library, "undo", "--dry-run").stdout
    assert said(store, "b").rating == 4
    assert json.loads(hubtool(library, "undo", "--json").stdout)["undone"] == 2
    assert said(store, "b").rating is None


def test_exporting_and_importing_on_the_command_line(library: Path, store: Store, tmp_path: Path) -> None:
    change(store, "/models/a.safetensors", "rating=3")
    for fmt in ("ndjson", "json"):
        done = hubtool(library, "export", "--said", "--format", fmt)
        hubtool(library, "set", "/models/a.safetensors", "rating!")
        again = hubtool(library, "import", "-", "--json", stdin=done.stdout.encode())
        assert (json.loads(again.stdout)["changed"], said(store, "a").rating) == (1, 3)
    assert hubtool(library, "export", "--format", "csv").stdout.startswith("id,title,notes,rating")
