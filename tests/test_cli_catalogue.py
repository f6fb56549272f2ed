"""The commands of the catalogue as a user types them."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hubtool.cli.main import cli
from hubtool.registry import settings
from tests.support.files import floats, write_safetensors

MODULE = "lora_unet_down_blocks_0_attentions_0_proj_in"


def lora(path: Path, seed: float = 0, rank: int = 4, **metadata: str) -> Path:
    tensors = {
        f"{MODULE}.lora_down.weight": floats(rank, 32, start=seed),
        f"{MODULE}.lora_up.weight": floats(32, rank, start=seed),
    }
    return write_safetensors(path, tensors, metadata or None)


def hubtool(*args: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def document(*args: object, code: int = 0) -> Any:
    return json.loads(hubtool(*args, code=code).stdout)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    lora(folder / "anime" / "big.safetensors", 1, rank=16, ss_output_name="Big Anime")
    lora(folder / "small.safetensors", 2)
    (folder / "bad.safetensors").write_bytes(b"<html>no</html>")
    return folder


@pytest.fixture
def scanned(root: Path) -> Path:
    hubtool("scan", root)
    return root


def test_scan_prints_counts_and_ends_well_with_broken_files(root: Path) -> None:
    result = hubtool("scan", root)
    assert result.stdout.split() == [
        "added",
        "3",
        "changed",
        "0",
        "moved",
        "0",
        "missing",
        "0",
        "unchanged",
        "0",
        "problems",
        "1",
    ]
    assert "bad.safetensors" in result.stderr
    again = document("scan", root, "--json", "--no-hash", "--workers", 2)
    assert {name: again[name] for name in ("added", "changed", "moved", "missing", "unchanged", "problems")} == {
        "added": 0, "changed": 0, "moved": 0, "missing": 0, "unchanged": 3, "problems": 0,
    }  # fmt: skip


def test_scan_of_a_path_that_cannot_be_read_is_partial(root: Path) -> None:
    result = hubtool("scan", root, root / "nothing", "--json", code=3)
    assert json.loads(result.stdout)["failed"] == [str(root / "nothing")]
    assert json.loads(result.stdout)["added"] == 3


def test_scan_without_a_path_scans_what_is_known(scanned: Path) -> None:
    assert document("scan", "--json")["unchanged"] == 3


def test_ls_prints_every_format(scanned: Path) -> None:
    rows = document("ls", "--json")
    assert {row["name"] for row in rows} == {"big.safetensors", "small.safetensors", "bad.safetensors"}
    assert [json.loads(line) for line in hubtool("ls", "--format", "ndjson").stdout.splitlines()] == rows
    assert len(list(csv.DictReader(io.StringIO(hubtool("ls", "--format", "csv").stdout)))) == 3
    assert set(hubtool("ls", "--format", "paths").stdout.split()) == {row["path"] for row in rows}
    assert "big.safetensors" in hubtool("ls").stdout


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["kind:lora"], ["big", "small"]),
        (["kind:lora", "-rank:16"], ["small"]),
        (["-kind:lora"], ["bad"]),
        (["^kind:lora"], ["bad"]),
        (["--", "-kind:lora"], ["bad"]),
        (["rank:8..32"], ["big"]),
        (["kind:lora rank:8..32"], ["big"]),
        (["big anime"], ["big"]),
        (["--path", "ANIME"], ["big"]),
        (["--kind", "lora", "--algorithm", "lora", "--text", "small"], ["small"]),
        (["--kind", "lora", "--sort=-size", "--limit", "1"], ["big"]),
        (["is:corrupt"], ["bad"]),
        (["--family", "flux1"], []),
    ],
)
def test_ls_filters(scanned: Path, args: list[str], names: list[str]) -> None:
    assert sorted(row["name"].removesuffix(".safetensors") for row in document("ls", "--json", *args)) == sorted(names)


def test_ls_with_an_unknown_field_names_the_nearest(scanned: Path) -> None:
    error = document("ls", "famly:sdxl", "--json", code=2)["error"]
    assert error["code"] == "usage"
    assert "'family'" in error["message"]


def test_an_empty_library_lists_nothing() -> None:
    assert document("ls", "--json") == []
    assert document("stats", "--json")["artifacts"] == 0


def test_show_prints_what_inspect_prints_and_what_the_library_adds(scanned: Path) -> None:
    path = scanned / "small.safetensors"
    inspected, shown = document("inspect", path, "--json"), document("show", path, "--json")
    missing = {
        name: inspected[name] for name in inspected.keys() - {"findings", "hashes"} if shown[name] != inspected[name]
    }
    assert missing == {}
    assert {name: shown["hashes"].get(name) for name in inspected["hashes"]} == inspected["hashes"]
    assert shown["locations"][0]["path"] == str(path)
    assert shown["locations"][0]["state"] == "present"
    assert shown["lineage"] == {"parents": [], "children": []}
    assert document("show", shown["id"], "--json") == shown
    assert document("show", shown["sha256"][:6], "--json") == shown
    assert "small.safetensors" in hubtool("show", shown["id"][:8]).stdout


def test_show_of_a_broken_file_tells_what_is_wrong(scanned: Path) -> None:
    assert "web page" in hubtool("show", scanned / "bad.safetensors").stdout


def test_show_of_something_unknown_says_how_to_scan_it(scanned: Path) -> None:
    other = lora(scanned.parent / "new.safetensors")
    error = document("show", other, "--json", code=1)["error"]
    assert error["code"] == "not-found"
    assert error["hint"].startswith("hubtool scan")


def test_stats_count(scanned: Path) -> None:
    found = document("stats", "--json")
    assert found["artifacts"] == 3
    assert {name: found["kind"][0][name] for name in ("value", "artifacts")} == {"value": "lora", "artifacts": 2}
    assert found["locations"] == {"present": 3}
    assert found["roots"][0]["path"] == str(scanned)
    assert "3 artifacts" in hubtool("stats").stdout


def test_fields_lists_the_query_language() -> None:
    assert {"kind", "size", "sort"} <= {row["field"] for row in document("fields", "--json")}
    hubtool("fields", "--format", "paths", code=2)


def test_verify_tells_good_from_bad(scanned: Path) -> None:
    good = scanned / "small.safetensors"
    assert document("verify", good, "--json") == {"verified": 1, "bad": 0, "files": [
        {"path": str(good), "status": "ok", "message": "", "expected": sha(good), "found": sha(good)},
    ]}  # fmt: skip
    with good.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x7f")
    assert "mismatch" in hubtool("verify", good, code=1).stdout
    good.unlink()
    assert document("verify", str(good), "--json", code=1)["files"][0]["status"] == "missing"


def sha(path: Path) -> str:
    return str(document("show", path, "--json")["sha256"])


def test_db_path_upgrade_check_and_backup(scanned: Path, tmp_path: Path) -> None:
    place = Path(hubtool("db", "path").stdout.strip())
    assert place.is_file()
    assert document("db", "upgrade", "--json") == {"before": "0002", "after": "0002"}
    assert document("db", "check", "--json") == {"ok": True, "integrity": [], "foreign_keys": [], "schema": "0002"}
    copy = tmp_path / "copy.sqlite3"
    assert hubtool("db", "backup", copy).stdout.strip() == str(copy)
    assert len(document("--library", copy, "ls", "--json")) == 3
    assert Path(hubtool("db", "backup").stdout.strip()).parent == place.parent


def test_db_upgrade_makes_a_library(tmp_path: Path) -> None:
    place = tmp_path / "sub" / "new.sqlite3"
    assert document("--library", place, "db", "upgrade", "--json") == {"before": None, "after": "0002"}
    assert document("--library", place, "db", "check", "--json")["ok"]


def test_an_outdated_library_says_what_to_do(scanned: Path) -> None:
    place = hubtool("db", "path").stdout.strip()
    sqlite3.connect(place).execute("PRAGMA user_version = 99").close()
    error = document("ls", "--json", code=1)["error"]
    assert error["code"] == "schema-outdated"
    assert document("db", "check", "--json")["ok"]


def test_a_locked_library_ends_with_5(scanned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hubtool.registry.store import Store

    lora(scanned / "another.safetensors", 9)
    holder = sqlite3.connect(hubtool("db", "path").stdout.strip(), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    unchecked = Store.unchecked.__func__  # type: ignore[attr-defined]
    patient = settings.BUSY_MS
    monkeypatch.setattr(
        Store,
        "unchecked",
        classmethod(lambda cls, target, create, busy_ms: unchecked(cls, target, create=create, busy_ms=10)),
    )
    assert document("scan", scanned, "--json", code=5)["error"]["code"] == "locked"
    assert patient == 15_000
    holder.close()


def test_reading_the_library_imports_nothing_heavy(scanned: Path) -> None:
    place = hubtool("db", "path").stdout.strip()
    heavy = ("sqlalchemy", "alembic", "torch", "numpy", "rich", "diffusers")
    for command in (["ls", "kind:lora"], ["show", str(scanned / "small.safetensors")], ["stats"], ["fields"]):
        code = (
            "import sys\nfrom hubtool.cli.main import cli\n"
            f"cli.main(['--library', {place!r}, *{command!r}], standalone_mode=False)\n"
            f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stderr.strip() == "[]", command
