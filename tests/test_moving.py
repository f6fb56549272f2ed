"""Files removed, moved, found twice, and brought back: ``rm``, ``mv``, ``dups``, ``undo``. The trash is one of the test's own."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hubtool.actions import move as mv
from hubtool.actions import moving, remove, undo
from hubtool.actions.companions import companions
from hubtool.actions.duplicates import duplicates
from hubtool.actions.library import open_store
from hubtool.actions.scan import scan
from hubtool.cli.main import cli
from hubtool.errors import FileError, FileMissing, NotFound, UsageProblem, WouldOverwrite
from hubtool.registry import browse, curation, journal
from hubtool.registry.store import Store
from tests.support.files import floats, safetensors_bytes, write_json, write_safetensors

DOWN = "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"
UP = "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"


def lora(number: int, **metadata: str) -> bytes:
    return safetensors_bytes({DOWN: floats(2, 4, start=number), UP: floats(4, 2, start=number)}, metadata)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "models"
    (made / "sub").mkdir(parents=True)
    (made / "a.safetensors").write_bytes(lora(1))
    (made / "b.safetensors").write_bytes(lora(2))
    (made / "sub" / "copy.safetensors").write_bytes(lora(1))
    for name in ("a.civitai.info", "a.preview.jpg", "a.json", "another.json"):
        (made / name).write_text("{}")
    return made


@pytest.fixture
def store(folder: Path) -> Iterator[Store]:
    with open_store() as opened:
        scan(opened, [str(folder)])
        yield opened


@pytest.fixture(autouse=True)
def _own_trash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from send2trash import plat_other

    home = tmp_path / "data"
    monkeypatch.setenv("XDG_DATA_HOME", str(home))
    monkeypatch.setattr(plat_other, "XDG_DATA_HOME", os.fsencode(home))
    monkeypatch.setattr(plat_other, "HOMETRASH_B", os.fsencode(home / "Trash"))
    monkeypatch.setattr(plat_other, "get_dev", lambda _path: 1)


def paths(store: Store, query: str = "") -> list[str]:
    from hubtool.registry.query import parse

    return sorted(
        place.path for row in browse.select(store, parse(query)) for place in row.places if place.state == "present"
    )


def below(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def rm(store: Store, *words: str, how: str = remove.TRASH) -> remove.Outcome:
    return remove.remove(store, remove.plan(store, words, how), how)


def to(store: Store, *words: str, folder: Path | None = None, template: str | None = None) -> mv.Outcome:
    return mv.move(store, mv.plan(store, words, folder, template))


def test_a_file_goes_into_the_trash_with_what_belongs_to_it(store: Store, folder: Path, tmp_path: Path) -> None:
    rm(store, str(folder / "a.safetensors"))
    assert below(folder) == ["another.json", "b.safetensors", "sub/copy.safetensors"]
    held = {path.name for path in (tmp_path / "data" / "Trash" / "files").iterdir()}
    assert held == {"a.safetensors", "a.civitai.info", "a.preview.jpg", "a.json"}


def test_a_path_removes_one_file_and_an_id_every_copy(store: Store, folder: Path) -> None:
    row = browse.find(store, str(folder / "a.safetensors"))
    assert [one.place.path for one in remove.plan(store, [str(folder / "a.safetensors")], remove.TRASH)] == [
        str(folder / "a.safetensors")
    ]
    rm(store, row.id)
    assert paths(store) == [str(folder / "b.safetensors")]


def test_the_trash_gives_back_what_undo_asks_for(store: Store, folder: Path, tmp_path: Path) -> None:
    before = {name: (folder / name).read_bytes() for name in below(folder)}
    with store.transaction():
        pass
    key = browse.find(store, str(folder / "b.safetensors")).key
    curation.change(store, [(key, "x")], lambda _key: lambda said: curation.Said(rating=4), "set")
    rm(store, "kind:lora")
    assert paths(store) == []
    assert undo.undo(store).left == []
    assert {name: (folder / name).read_bytes() for name in below(folder)} == before
    assert len(paths(store)) == 3
    assert not list((tmp_path / "data" / "Trash").rglob("*.trashinfo"))
    assert scan(store, [str(folder)]).unchanged == 3
    assert curation.read(store, [key])[key].rating == 4


def test_undo_never_overwrites_what_came_meanwhile(store: Store, folder: Path) -> None:
    rm(store, str(folder / "b.safetensors"))
    (folder / "b.safetensors").write_bytes(lora(9))
    result = undo.undo(store)
    assert result.undone == 0
    assert "something lies there already" in result.left[0]
    assert (folder / "b.safetensors").read_bytes() == lora(9)


def test_what_the_trash_lost_is_said(store: Store, folder: Path, tmp_path: Path) -> None:
    rm(store, str(folder / "b.safetensors"))
    (tmp_path / "data" / "Trash" / "files" / "b.safetensors").unlink()
    assert "no longer in the trash" in undo.undo(store).left[0]


def test_a_trashed_file_keeps_its_row_and_user_data(store: Store, folder: Path) -> None:
    rm(store, str(folder / "b.safetensors"))
    assert [place.state for place in browse.find(store, str(folder / "b.safetensors")).places] == ["trashed"]


def test_forgetting_leaves_files_alone_and_can_be_undone(store: Store, folder: Path) -> None:
    rm(store, str(folder / "b.safetensors"), how=remove.FORGET)
    assert (folder / "b.safetensors").exists()
    assert str(folder / "b.safetensors") not in paths(store)
    undo.undo(store)
    assert str(folder / "b.safetensors") in paths(store)


def test_missing_files_can_be_forgotten_by_query(store: Store, folder: Path) -> None:
    (folder / "b.safetensors").unlink()
    scan(store, [str(folder)])
    assert len(rm(store, "is:missing", how=remove.FORGET).removed) == 1
    with pytest.raises(NotFound):
        rm(store, "is:missing", how=remove.FORGET)


def test_deleting_for_good_cannot_be_undone(store: Store, folder: Path) -> None:
    rm(store, str(folder / "b.safetensors"), how=remove.DELETE)
    assert not (folder / "b.safetensors").exists()
    assert "deleted for good" in undo.undo(store).left[0]
    assert journal.records(store)[0].state == journal.DONE


def test_a_file_that_cannot_be_removed_stops_no_other(store: Store, folder: Path) -> None:
    removals = remove.plan(store, ["kind:lora"], remove.TRASH)
    (folder / "b.safetensors").unlink()
    outcome = remove.remove(store, removals, remove.TRASH)
    assert list(outcome.failed) == [str(folder / "b.safetensors")]
    assert below(folder) == ["another.json"]


def test_a_folder_that_is_one_artifact_is_removed_and_restored_whole(store: Store, folder: Path) -> None:
    peft = folder / "peft"
    write_json(peft / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    write_safetensors(peft / "adapter_model.safetensors", {"base_model.model.unet.x.lora_A.weight": floats(2, 4)})
    scan(store, [str(folder)])
    rm(store, str(peft))
    assert not peft.exists()
    undo.undo(store)
    assert below(peft) == ["adapter_config.json", "adapter_model.safetensors"]
    assert str(peft) in paths(store)


def test_a_sidecar_that_two_models_share_stays(folder: Path) -> None:
    (folder / "a.ckpt").write_bytes(b"x")
    assert companions(folder / "a.safetensors") == []


def test_a_picture_that_is_an_artifact_belongs_to_nobody(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"x")
    assert folder / "a.png" in companions(folder / "a.safetensors")
    assert folder / "a.png" not in companions(folder / "a.safetensors", {str(folder / "a.png")})


def test_the_shards_of_an_index_belong_to_it(tmp_path: Path) -> None:
    names = [
        "m-00001-of-00002.safetensors",
        "m-00002-of-00002.safetensors",
        "m.safetensors.index.json",
        "n-00001-of-00002.safetensors",
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert [file.name for file in companions(tmp_path / names[2])] == names[:2]


def test_files_move_into_a_folder_with_what_belongs_to_them(store: Store, folder: Path) -> None:
    to(store, str(folder / "a.safetensors"), folder=folder / "kept")
    assert [name for name in below(folder) if name.startswith("kept")] == [
        "kept/a.civitai.info", "kept/a.json", "kept/a.preview.jpg", "kept/a.safetensors",
    ]  # fmt: skip
    assert scan(store, [str(folder)]).unchanged == 3
    undo.undo(store)
    assert "a.preview.jpg" in below(folder)
    assert scan(store, [str(folder)]).unchanged == 3


def test_a_template_makes_folders_and_names(store: Store, folder: Path) -> None:
    key = browse.find(store, str(folder / "b.safetensors")).key
    curation.change(store, [(key, "x")], lambda _key: lambda said: curation.Said(tags=("my/tag",)), "tag")
    to(store, str(folder / "b.safetensors"), template="{kind}/{base|unknown}/{tag}_{stem}-r{rank}")
    assert "lora/unknown/my_tag_b-r2.safetensors" in below(folder)
    assert browse.find(store, str(folder / "lora" / "unknown" / "my_tag_b-r2.safetensors")).key == key


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{colour}", "no field 'colour'"),
        ("{title}", "no name"),
        ("{stem", "cannot be read"),
        ("a//{stem}", "no name"),
        ("../{stem}", "no name"),
    ],
)
def test_templates_that_make_no_sense_are_refused(store: Store, template: str, problem: str) -> None:
    with pytest.raises(UsageProblem, match=problem):
        mv.plan(store, ["kind:lora"], None, template)


@pytest.mark.parametrize(
    ("text", "made"), [("con", "_con"), ("a:b?c", "a_b_c"), (" .x. ", "x"), ("é" * 300, "é" * 100), ("..", "")]
)
def test_names_are_safe_on_every_system(store: Store, text: str, made: str) -> None:
    assert mv._part("{title}", {"title": text}) == made


def test_two_files_never_become_one(store: Store, folder: Path) -> None:
    with pytest.raises(WouldOverwrite, match="would both go there"):
        mv.plan(store, ["kind:lora"], None, "{kind}")
    (folder / "kept").mkdir()
    (folder / "kept" / "b.safetensors").write_bytes(b"mine")
    with pytest.raises(WouldOverwrite, match="lies there already"):
        mv.plan(store, [str(folder / "b.safetensors")], folder / "kept", None)


def test_what_appears_after_the_plan_is_not_overwritten(store: Store, folder: Path) -> None:
    found = mv.plan(store, [str(folder / "b.safetensors")], folder / "kept", None)
    (folder / "kept").mkdir()
    (folder / "kept" / "b.safetensors").write_bytes(b"mine")
    outcome = mv.move(store, found)
    assert list(outcome.failed) == [str(folder / "b.safetensors")]
    assert (folder / "kept" / "b.safetensors").read_bytes() == b"mine"


def test_files_may_leave_every_scanned_folder(store: Store, folder: Path, tmp_path: Path) -> None:
    to(store, str(folder / "b.safetensors"), folder=tmp_path / "archive")
    assert str(tmp_path / "archive" / "b.safetensors") in paths(store)
    undo.undo(store)
    assert str(folder / "b.safetensors") in paths(store)


def _elsewhere(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """``folder`` is another file system."""
    link = os.link

    def across(source: str, target: str, **options: bool) -> None:
        if str(folder) in str(target) and str(folder) not in str(source):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        link(source, target, **options)

    monkeypatch.setattr(os, "link", across)


def test_moving_to_another_file_system_copies_compares_and_deletes(
    store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _elsewhere(monkeypatch, tmp_path / "disk")
    stamp = (folder / "b.safetensors").stat().st_mtime_ns
    to(store, str(folder / "b.safetensors"), folder=tmp_path / "disk")
    moved = tmp_path / "disk" / "b.safetensors"
    assert (moved.read_bytes(), moved.stat().st_mtime_ns) == (lora(2), stamp)
    assert not (folder / "b.safetensors").exists()
    assert scan(store, [str(tmp_path / "disk")]).unchanged == 1


def test_a_copy_that_goes_wrong_leaves_everything_as_it_was(
    store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _elsewhere(monkeypatch, tmp_path / "disk")
    monkeypatch.setattr(moving, "_copied", lambda _source, part: part.write_bytes(b"wrong") and "digest")
    assert to(store, str(folder / "b.safetensors"), folder=tmp_path / "disk").moved == []
    assert (folder / "b.safetensors").read_bytes() == lora(2)
    assert list((tmp_path / "disk").iterdir()) == []


def test_moving_what_is_gone_or_may_not_be_moved_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileMissing):
        moving.move(tmp_path / "none", tmp_path / "x")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "other").write_bytes(b"x")
    with pytest.raises(FileError):
        moving.move(tmp_path / "other", tmp_path / "file" / "x")


def test_an_interrupted_move_is_taken_back_by_undo(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = mv.plan(store, [str(folder / "b.safetensors"), str(folder / "a.safetensors")], folder / "kept", None)
    done = []

    def killed(source: Path, target: Path) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(target)
        os.renames(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(mv.moving, "move", killed)
        with pytest.raises(KeyboardInterrupt):
            mv.move(store, found)
    assert journal.records(store)[0].state == journal.OPEN
    assert undo.undo(store).left == []
    assert len(paths(store)) == 3
    assert below(folder) == sorted(
        [
            "a.civitai.info",
            "a.json",
            "a.preview.jpg",
            "a.safetensors",
            "another.json",
            "b.safetensors",
            "sub/copy.safetensors",
        ]
    )


def test_an_interrupted_removal_is_taken_back_by_undo(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removals = remove.plan(store, [str(folder / "a.safetensors"), str(folder / "b.safetensors")], remove.TRASH)

    def killed(*_args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(remove.placing, "retire", killed)
        with pytest.raises(KeyboardInterrupt):
            remove.remove(store, removals, remove.TRASH)
    assert not (folder / "a.safetensors").exists()
    result = undo.undo(store)
    assert (result.undone, result.left) == (1, [])
    assert (folder / "a.safetensors").read_bytes() == lora(1)
    assert len(paths(store)) == 3


def test_the_same_bytes_are_found_twice(store: Store, folder: Path) -> None:
    groups = duplicates(store)
    assert [[Path(place.path).name for _, place in group.members] for group in groups] == [
        ["a.safetensors", "copy.safetensors"]
    ]
    assert groups[0].wasted == len(lora(1))


def test_hard_links_are_one_file(store: Store, folder: Path) -> None:
    os.link(folder / "b.safetensors", folder / "linked.safetensors")
    scan(store, [str(folder)])
    assert len(duplicates(store)) == 1


def test_files_that_differ_in_the_header_have_the_same_payload(store: Store, folder: Path) -> None:
    (folder / "c.safetensors").write_bytes(lora(2, ss_comment="edited"))
    scan(store, [str(folder)])
    for tier in ("payload", "content"):
        names = [[Path(place.path).name for _, place in group.members] for group in duplicates(store, tier=tier)]
        assert ["b.safetensors", "c.safetensors"] in names
    assert len(duplicates(store)) == 1


def test_a_rule_says_which_of_a_group_to_keep(store: Store, folder: Path) -> None:
    assert duplicates(store, keep="shortest")[0].members[0][1].path == str(folder / "a.safetensors")
    os.utime(folder / "sub" / "copy.safetensors", ns=(0, 0))
    scan(store, [str(folder)])
    assert duplicates(store, keep="oldest")[0].members[0][1].path == str(folder / "sub" / "copy.safetensors")
    with pytest.raises(UsageProblem):
        duplicates(store, tier="guess")


def hubtool(*args: str) -> Result:
    return CliRunner().invoke(cli, list(args))


def test_removing_on_the_command_line_needs_a_yes(store: Store, folder: Path) -> None:
    target = str(folder / "b.safetensors")
    assert target in hubtool("rm", target, "--dry-run").stdout
    refused = hubtool("rm", target)
    assert refused.exit_code == 2
    assert "nobody is here to confirm" in refused.stderr
    assert Path(target).exists()
    done = json.loads(hubtool("rm", target, "--yes", "--json").stdout)
    assert done["removed"] == [target]
    assert not Path(target).exists()
    assert hubtool("undo", done["journal"]).exit_code == 0
    assert Path(target).exists()


def test_a_query_word_is_not_taken_for_yes(store: Store, folder: Path) -> None:
    assert hubtool("rm", "kind:lora", "-style").exit_code == 2
    assert len(paths(store)) == 3


def test_moving_on_the_command_line(store: Store, folder: Path) -> None:
    target = str(folder / "b.safetensors")
    plan = json.loads(hubtool("mv", target, "--to", str(folder / "kept"), "--dry-run", "--json").stdout)
    assert plan["moves"][0]["to"] == str(folder / "kept" / "b.safetensors")
    done = json.loads(hubtool("mv", target, "--to", str(folder / "kept"), "--yes", "--json").stdout)
    assert [pair["to"] for pair in done["moved"]] == [str(folder / "kept" / "b.safetensors")]


def test_duplicates_on_the_command_line_feed_rm(store: Store, folder: Path) -> None:
    assert hubtool("dups", "--format", "paths").stdout.splitlines() == [str(folder / "sub" / "copy.safetensors")]
    assert "exact" in hubtool("dups").stdout
