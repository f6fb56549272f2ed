"""Scanning: what is found, what is left out, what happens to rows when files move, change, break or vanish."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hubtool.actions import lineage, scan_record
from hubtool.actions.scan import ScanResult, scan
from hubtool.actions.scan_walk import walk
from hubtool.actions.verify import verify
from hubtool.errors import LibraryLocked
from hubtool.registry import browse, hashing, scanning, schema
from hubtool.registry.query import parse
from hubtool.registry.store import Store
from tests.support.files import floats, write_json, write_safetensors
from tests.support.library import artifact_of, tag

MODULE = "lora_unet_down_blocks_0_attentions_0_proj_in"


def lora(path: Path, seed: float = 0, **metadata: str) -> Path:
    tensors = {
        f"{MODULE}.lora_down.weight": floats(4, 8, start=seed),
        f"{MODULE}.lora_up.weight": floats(8, 4, start=seed),
    }
    return write_safetensors(path, tensors, metadata or None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "library.sqlite3") as opened:
        yield opened
        assert schema.check(opened.engine, opened.path).ok


def run(store: Store, *paths: Path, **options: Any) -> ScanResult:
    return scan(store, [str(path) for path in paths], **{"hashes": False, "workers": 1, **options})


def counts(result: ScanResult) -> tuple[int, int, int, int, int]:
    return result.added, result.changed, result.moved, result.missing, result.unchanged


def listed(store: Store, query: str = "") -> list[str]:
    return sorted(
        Path(place.path).name
        for row in browse.select(store, parse(query))
        for place in row.places
        if place.state != "missing"
    )


def test_a_scan_records_what_the_file_is(store: Store, root: Path) -> None:
    lora(root / "a.safetensors", ss_output_name="My Style", modelspec="x", sshs_model_hash="AB" * 32)
    assert counts(run(store, root)) == (1, 0, 0, 0, 0)
    row = browse.find(store, str(root / "a.safetensors"))
    assert (row.kind, row.algorithm, row.rank, row.format, row.title) == ("lora", "lora", 4, "safetensors", "My Style")
    assert browse.hashes(store, row.key) == {"embedded": {"payload_sha256": "ab" * 32}}
    assert browse.identity(store, row.key)["tensors"] == 2


def test_a_second_scan_finds_nothing_new_and_opens_nothing(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora(root / "a.safetensors")
    run(store, root)
    monkeypatch.setattr("hubtool.actions.scan.describe", None)
    assert counts(run(store, root)) == (0, 0, 0, 0, 1)


def test_a_renamed_file_keeps_its_row_without_being_read(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora(root / "a.safetensors")
    run(store, root)
    key = artifact_of(store, b"a.safetensors")
    (root / "sub").mkdir()
    (root / "a.safetensors").rename(root / "sub" / "b.safetensors")
    monkeypatch.setattr("hubtool.actions.scan.describe", None)
    assert counts(run(store, root)) == (0, 0, 1, 0, 0)
    assert artifact_of(store, b"sub/b.safetensors") == key


def test_a_file_moved_as_a_copy_keeps_its_row(store: Store, root: Path) -> None:
    lora(root / "a.safetensors")
    run(store, root)
    key = artifact_of(store, b"a.safetensors")
    (root / "b.safetensors").write_bytes((root / "a.safetensors").read_bytes())
    (root / "a.safetensors").unlink()
    assert counts(run(store, root)) == (0, 0, 1, 0, 0)
    assert artifact_of(store, b"b.safetensors") == key


def test_a_file_moved_to_another_root_keeps_its_row(store: Store, tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    lora(first / "a.safetensors")
    lora(second / "b.safetensors", 5)
    run(store, first, second)
    key = artifact_of(store, b"a.safetensors")
    (first / "a.safetensors").rename(second / "c.safetensors")
    assert counts(run(store)) == (0, 0, 1, 0, 1)
    assert artifact_of(store, b"c.safetensors") == key


def test_two_files_that_swap_names_swap_their_rows(store: Store, root: Path) -> None:
    a, b = lora(root / "a.safetensors", 1), lora(root / "b.safetensors", 2)
    run(store, root)
    before = artifact_of(store, b"a.safetensors"), artifact_of(store, b"b.safetensors")
    a.rename(root / "t")
    b.rename(a)
    (root / "t").rename(b)
    assert counts(run(store, root)) == (0, 0, 2, 0, 0)
    assert (artifact_of(store, b"b.safetensors"), artifact_of(store, b"a.safetensors")) == before


def test_a_changed_file_is_a_new_artifact_with_the_old_user_data(store: Store, root: Path) -> None:
    path = lora(root / "a.safetensors", 1)
    run(store, root)
    tag(store, artifact_of(store, b"a.safetensors"), ["mine"])
    lora(path, 2)
    assert counts(run(store, root)) == (0, 1, 0, 0, 0)
    assert browse.by_key(store, artifact_of(store, b"a.safetensors")).tags == ("mine",)
    assert listed(store) == ["a.safetensors"]


def test_a_touched_file_is_unchanged_but_hashed_again(store: Store, root: Path) -> None:
    path = lora(root / "a.safetensors")
    run(store, root, hashes=True)
    os.utime(path, (1, 1))
    assert counts(run(store, root)) == (0, 0, 0, 0, 1)
    assert hashing.queued_bytes(store)[0] == 1


def test_a_deleted_file_is_missing_and_comes_back(store: Store, root: Path) -> None:
    path = lora(root / "a.safetensors")
    lora(root / "b.safetensors", 2)
    run(store, root)
    key = artifact_of(store, b"a.safetensors")
    content = path.read_bytes()
    path.unlink()
    assert counts(run(store, root)) == (0, 0, 0, 1, 1)
    assert listed(store) == ["b.safetensors"]
    assert [row.key for row in browse.select(store, parse("is:missing"))] == [key]
    path.write_bytes(content)
    run(store, root)
    assert artifact_of(store, b"a.safetensors") == key


def test_broken_files_are_rows_with_a_problem(store: Store, root: Path) -> None:
    (root / "page.safetensors").write_bytes(b"<!DOCTYPE html><html>not a model</html>")
    (root / "pointer.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    (root / "empty.ckpt").touch()
    lora(root / "ok.safetensors")
    (root / "short.safetensors").write_bytes((root / "ok.safetensors").read_bytes()[:-9])
    result = run(store, root)
    assert result.added == 5
    assert len(result.problems) == 4
    assert listed(store, "is:corrupt") == ["empty.ckpt", "page.safetensors", "pointer.safetensors", "short.safetensors"]
    row = browse.find(store, str(root / "page.safetensors"))
    assert browse.findings(store, row.key)[0]["severity"] == "error"


def test_a_mended_file_is_no_problem_any_more(store: Store, root: Path) -> None:
    path = root / "a.safetensors"
    path.write_bytes(b"<html>")
    run(store, root)
    lora(path)
    assert run(store, root).problems == []
    assert listed(store, "is:corrupt") == []


def test_what_is_no_artifact_is_left_out(store: Store, root: Path) -> None:
    kept = lora(root / "a.safetensors")
    for name in (
        "x.safetensors.part",
        "x.safetensors.hubtool-part",
        "x.aria2",
        "x.incomplete",
        "notes.txt",
        "._a.safetensors",
        "p.jpg",
    ):
        (root / name).write_bytes(kept.read_bytes())
    for folder in (".git", ".cache"):
        lora(root / folder / "b.safetensors")
    (root / "preview.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    os.mkfifo(root / "pipe.safetensors")
    assert counts(run(store, root)) == (1, 0, 0, 0, 0)
    assert listed(store) == ["a.safetensors"]


def test_the_library_itself_is_never_opened(root: Path) -> None:
    with Store.open(root / "library.bin") as store:
        os.link(root / "library.bin", root / "other.safetensors")
        assert counts(run(store, root)) == (0, 0, 0, 0, 0)


def test_folders_that_are_one_artifact_are_one_row(store: Store, root: Path) -> None:
    folder = root / "peft"
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q"]})
    prefix = "base_model.model.down_blocks.0.attentions.0.proj_in"
    tensors = {f"{prefix}.lora_A.weight": floats(4, 8), f"{prefix}.lora_B.weight": floats(8, 4)}
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    write_json(root / "pipe" / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    write_safetensors(root / "pipe" / "vae" / "diffusion_pytorch_model.safetensors", {"a": floats(2)})
    result = run(store, root)
    assert result.added == 2
    assert listed(store) == ["peft", "pipe"]
    assert counts(run(store, root)) == (0, 0, 0, 0, 2)
    assert counts(run(store, folder)) == (0, 0, 0, 0, 1)
    folder.rename(root / "renamed")
    assert counts(run(store, root)) == (0, 0, 1, 0, 1)


def test_shards_with_an_index_are_one_candidate(root: Path) -> None:
    for part in ("00001", "00002"):
        write_safetensors(root / f"m-{part}-of-00002.safetensors", {part: floats(2)})
    write_safetensors(root / "other-00001-of-00001.safetensors", {"a": floats(2)})
    write_json(root / "m.safetensors.index.json", {"weight_map": {}})
    found = walk(os.fsencode(root)).found
    assert [(each.relpath, each.form) for each in found] == [
        (b"m.safetensors.index.json", "sharded"),
        (b"other-00001-of-00001.safetensors", "file"),
    ]


def test_links_are_followed_once(store: Store, root: Path, tmp_path: Path) -> None:
    target = lora(tmp_path / "elsewhere" / "real.safetensors")
    lora(root / "d" / "a.safetensors", 3)
    (root / "link.safetensors").symlink_to(target)
    os.link(root / "d" / "a.safetensors", root / "hard.safetensors")
    (root / "d" / "loop").symlink_to(root)
    (root / "twice").symlink_to(root / "d")
    (root / "broken.safetensors").symlink_to(root / "nowhere")
    run(store, root)
    assert listed(store) == ["a.safetensors", "hard.safetensors", "link.safetensors"]
    assert artifact_of(store, b"hard.safetensors") == artifact_of(store, b"d/a.safetensors")


def test_names_in_any_bytes_are_indexed(store: Store, root: Path) -> None:
    name = os.path.join(os.fsencode(root), b"\xff caf\xe9 \n.safetensors")
    content = lora(root / "a.safetensors").read_bytes()
    (root / "a.safetensors").unlink()
    with open(name, "wb") as stream:
        stream.write(content)
    assert run(store, root).added == 1
    assert browse.find(store, os.fsdecode(name)).kind == "lora"


def test_a_root_that_is_gone_is_offline_and_comes_back(store: Store, root: Path, tmp_path: Path) -> None:
    lora(root / "a.safetensors")
    run(store, root)
    root.rename(tmp_path / "away")
    result = run(store)
    assert result.offline == [str(root)]
    assert result.missing == 0
    assert [row.state for row in browse.select(store, parse(""))] == ["offline"]
    assert run(store, root).offline == [str(root)]
    (tmp_path / "away").rename(root)
    assert counts(run(store)) == (0, 0, 0, 0, 1)
    assert [row.state for row in browse.select(store, parse(""))] == ["present"]


def test_an_empty_mount_point_is_offline(store: Store, root: Path, tmp_path: Path) -> None:
    lora(root / "a.safetensors")
    run(store, root)
    root.rename(tmp_path / "away")
    root.mkdir()
    assert run(store).offline == [str(root)]


def test_losing_most_of_many_files_is_taken_for_another_disk_unless_told(store: Store, root: Path) -> None:
    for at in range(30):
        lora(root / f"{at}.safetensors", at)
    run(store, root)
    for at in range(28):
        (root / f"{at}.safetensors").unlink()
    result = run(store, root)
    assert result.offline == [str(root)]
    assert len(listed(store)) == 30
    assert counts(run(store, root, accept_missing=True)) == (0, 0, 0, 28, 2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_keeps_its_rows(store: Store, root: Path) -> None:
    lora(root / "d" / "a.safetensors")
    run(store, root)
    (root / "d").chmod(0)
    result = run(store, root)
    (root / "d").chmod(0o755)
    assert result.missing == 0
    assert len(result.problems) == 1


def test_a_folder_that_is_deleted_takes_its_rows_along(store: Store, root: Path) -> None:
    path = lora(root / "d" / "a.safetensors")
    lora(root / "b.safetensors", 2)
    run(store, root)
    path.unlink()
    path.parent.rmdir()
    assert counts(run(store, root / "d")) == (0, 0, 0, 1, 0)


def test_scanning_a_part_says_nothing_about_the_rest(store: Store, root: Path) -> None:
    lora(root / "d" / "a.safetensors")
    other = lora(root / "b.safetensors", 2)
    run(store, root)
    other.unlink()
    assert counts(run(store, root / "d")) == (0, 0, 0, 0, 1)
    assert len(listed(store)) == 2
    assert len(scanning.roots(store)) == 1


def test_a_root_inside_another_stays_a_root_of_its_own(store: Store, root: Path) -> None:
    lora(root / "d" / "a.safetensors")
    lora(root / "b.safetensors", 2)
    run(store, root / "d")
    assert counts(run(store, root)) == (1, 0, 0, 0, 1)
    assert len(scanning.roots(store)) == 2


def test_a_single_file_does_not_make_its_folder_a_root_to_walk(store: Store, root: Path) -> None:
    path = lora(root / "a.safetensors")
    lora(root / "b.safetensors", 2)
    assert counts(run(store, path)) == (1, 0, 0, 0, 0)
    assert counts(run(store)) == (0, 0, 0, 0, 1)
    assert counts(run(store, root)) == (1, 0, 0, 0, 1)


def test_a_path_that_is_not_there_is_reported(store: Store, root: Path) -> None:
    assert run(store, root / "nothing").failed == [str(root / "nothing")]


def test_hashing_follows_and_gives_every_name_of_a_file(store: Store, root: Path) -> None:
    import hashlib

    path = lora(root / "a.safetensors")
    assert run(store, root, hashes=True).hashed == 1
    row = browse.find(store, str(path))
    content = path.read_bytes()
    body = content[8 + int.from_bytes(content[:8], "little") :]
    computed = browse.hashes(store, row.key)["computed"]
    assert row.sha256 == computed["sha256"] == hashlib.sha256(content).hexdigest()
    assert computed["payload_sha256"] == hashlib.sha256(body).hexdigest()
    assert computed["autov2"] == row.sha256[:10]
    assert computed["autov3"] == computed["payload_sha256"][:12]
    assert len(computed["content_id"]) == 64
    assert run(store, root, hashes=True).hashed == 0


def test_broken_files_are_hashed_like_any_other(store: Store, root: Path) -> None:
    (root / "a.safetensors").write_bytes(b"<html>")
    assert run(store, root, hashes=True).hashed == 1
    assert len(run(store, root, hashes=True).problems) == 0
    assert [verdict.status for verdict in verify(store)] == ["ok"]


def test_copies_become_one_artifact_when_they_are_hashed(store: Store, root: Path) -> None:
    path = lora(root / "a.safetensors")
    (root / "b.safetensors").write_bytes(path.read_bytes())
    run(store, root, hashes=True)
    (row,) = browse.select(store, parse(""))
    assert len(row.places) == 2


def test_a_folder_has_a_hash_over_its_files(store: Store, root: Path) -> None:
    write_json(root / "peft" / "adapter_config.json", {"peft_type": "LORA", "r": 4})
    prefix = "base_model.model.down_blocks.0.attentions.0.proj_in"
    tensors = {f"{prefix}.lora_A.weight": floats(4, 8), f"{prefix}.lora_B.weight": floats(8, 4)}
    write_safetensors(root / "peft" / "adapter_model.safetensors", tensors)
    run(store, root, hashes=True)
    row = browse.find(store, str(root / "peft"))
    assert set(browse.hashes(store, row.key)["computed"]) >= {"tree_sha256"}


def test_hashing_goes_on_where_it_was_interrupted(store: Store, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for at in range(5):
        lora(root / f"{at}.safetensors", at)
    from hubtool.actions import scan_hash

    real, seen = scan_hash.hash_place, []

    def interrupted(place: Any) -> Any:
        seen.append(place)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(place)

    monkeypatch.setattr(scan_hash, "hash_place", interrupted)
    monkeypatch.setattr(scan_hash, "_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        run(store, root, hashes=True)
    monkeypatch.setattr(scan_hash, "hash_place", real)
    result = run(store, root, hashes=True)
    assert result.unchanged == 5
    assert 0 < result.hashed < 5
    assert hashing.queued_bytes(store)[0] == 0


def test_a_file_that_grows_while_it_is_read_is_left_for_the_next_scan(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lora(root / "a.safetensors")
    real = scan_record._read

    def growing(found: Any) -> Any:
        with path.open("ab") as stream:
            stream.write(b"x")
        return real(found)

    monkeypatch.setattr(scan_record, "_read", growing)
    result = run(store, root)
    assert result.added == 0
    assert "changing" in result.problems[0]["message"]


def test_verify_finds_what_no_stat_can_show(store: Store, root: Path) -> None:
    path = lora(root / "a.safetensors")
    lora(root / "b.safetensors", 2).touch()
    run(store, root, hashes=True)
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    (root / "b.safetensors").unlink()
    assert run(store, root / "a.safetensors").unchanged == 1
    found = {Path(verdict.path).name: verdict.status for verdict in verify(store)}
    assert found == {"a.safetensors": "mismatch", "b.safetensors": "missing"}
    row = browse.find(store, str(path))
    assert [finding["code"] for finding in browse.findings(store, row.key) if finding["source"] == "verify"] == [
        "hash-mismatch"
    ]
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [verdict.status for verdict in verify(store, [str(path)])] == ["ok"]
    assert not [finding for finding in browse.findings(store, row.key) if finding["source"] == "verify"]


def test_an_output_is_recorded_with_its_parents(store: Store, root: Path, tmp_path: Path) -> None:
    source = lora(root / "a.safetensors")
    run(store, root)
    stranger, output = lora(tmp_path / "s.safetensors", 8), lora(tmp_path / "out" / "o.safetensors", 9)
    uid = lineage.record_output(store, output, [source, stranger], "merge", {"method": "svd"}, strengths=[0.5])
    assert uid is not None
    row = browse.find(store, uid)
    edges = browse.lineage(store, row.key)["parents"]
    assert [edge["strength"] for edge in edges] == [0.5, None]
    assert edges[0]["id"] == browse.find(store, str(source)).id
    assert edges[1]["id"] is None
    assert len(edges[1]["ref"]) == 64
    assert lineage.record_output(store, output, [stranger], "convert") is None


def test_a_conversion_outside_of_any_library_makes_none(tmp_path: Path) -> None:
    target = tmp_path / "none.sqlite3"
    assert lineage.record_conversion(str(target), tmp_path / "o", [tmp_path / "i"], "convert") is None
    assert not target.exists()


def test_a_scan_that_cannot_write_is_locked_out(store: Store, root: Path) -> None:
    lora(root / "a.safetensors")
    assert store.path
    holder = sqlite3.connect(store.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with Store.open(store.path, busy_ms=10) as other, pytest.raises(LibraryLocked):
        run(other, root)
    holder.close()


def scanning_process(library_path: Path, root: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "hubtool", "--library", str(library_path), "scan", str(root), "--json", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_scans_at_once_lose_nothing(store: Store, root: Path) -> None:
    for at in range(120):
        lora(root / f"{at}.safetensors", at)
    assert store.path
    both = [scanning_process(store.path, root) for _ in range(2)]
    ended = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    assert sum(json.loads(out)["added"] for out, _ in ended) == 120
    assert len(listed(store)) == 120
    assert store.rows("SELECT COUNT(*) FROM location") == [(120,)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_scan_that_is_stopped_goes_on_the_next_time(store: Store, root: Path, number: signal.Signals) -> None:
    for at in range(900):
        lora(root / f"{at}.safetensors", at)
    assert store.path
    process = scanning_process(store.path, root)
    deadline = time.monotonic() + 30
    while (
        process.poll() is None and time.monotonic() < deadline and not store.rows("SELECT COUNT(*) FROM artifact")[0][0]
    ):
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate()
    if number == signal.SIGINT and process.returncode != 0:
        assert process.returncode == 130
    assert schema.check(store.engine, store.path).ok
    result = run(store, root)
    assert result.added + result.unchanged == 900
    assert store.rows("SELECT COUNT(*) FROM location") == [(900,)]
