"""The library as a file: creation, schema, migrations, backups, locks, refusals."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_mock_engine, insert

from hubtool import resources
from hubtool.errors import LibraryLocked, NotFound, RegistryError, SchemaOutdated
from hubtool.registry import models, schema, settings
from hubtool.registry.engine import make_engine
from hubtool.registry.fast import FastReader
from hubtool.registry.store import Store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "library.sqlite3"


@pytest.fixture
def store(path: Path) -> Store:
    return Store.open(path)


def pragma(store: Store, name: str) -> object:
    with store.reading() as connection:
        return connection.exec_driver_sql(f"PRAGMA {name}").scalar()


def definitions(path: Path) -> dict[str, str]:
    rows = sqlite3.connect(path).execute(
        "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name <> 'alembic_version'"
    )
    return dict(rows.fetchall())


def test_first_use_makes_a_library_with_the_newest_schema(store: Store) -> None:
    assert schema.check(store.engine, store.path) == schema.Check((), (), schema.HEAD)


def test_a_library_needs_to_exist_where_none_may_be_made(path: Path) -> None:
    with pytest.raises(NotFound):
        Store.open(path, create=False)
    assert not path.exists()


def test_the_models_and_the_migrations_agree(store: Store) -> None:
    with store.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), models.metadata) == []


def test_the_migrations_make_every_constraint_of_the_models(store: Store, path: Path, tmp_path: Path) -> None:
    other = tmp_path / "direct.sqlite3"
    models.metadata.create_all(make_engine(str(other)))
    constraint = re.compile(r"(?:CONSTRAINT \w+ )?CHECK \(.*?\)\)?|STRICT|WHERE .*")

    def constraints(sql: str) -> list[str]:
        return sorted(constraint.findall(sql))

    made, wanted = definitions(path), definitions(other)
    assert made.keys() == wanted.keys()
    assert {name: constraints(sql) for name, sql in made.items()} == {
        name: constraints(sql) for name, sql in wanted.items()
    }


def test_the_number_of_migrations_is_the_schema_version() -> None:
    versions = sorted(resources.migrations().glob("versions/*.py"))
    assert len(versions) == settings.SCHEMA_VERSION
    assert versions[-1].name.startswith(schema.HEAD)


def test_the_models_compile_for_postgresql() -> None:
    statements: list[str] = []
    engine = create_mock_engine(
        "postgresql://", lambda sql, *_a, **_k: statements.append(str(sql.compile(dialect=engine.dialect)))
    )
    models.metadata.create_all(engine, checkfirst=False)
    text = "\n".join(statements)
    assert "BIGINT" in text
    assert "BYTEA" in text
    assert ") STRICT" not in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("foreign_keys", 1),
        ("trusted_schema", 0),
        ("cell_size_check", 1),
        ("synchronous", 2),
        ("application_id", settings.APPLICATION_ID),
    ],
)
def test_every_connection_has_the_settings_of_the_security_report(store: Store, name: str, value: int) -> None:
    assert pragma(store, name) == value


def test_wal_is_used_only_with_a_repaired_sqlite_on_a_local_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(settings.sqlite3, "sqlite_version_info", (3, 51, 2))
    assert settings.journal_mode(tmp_path / "x") == "delete"
    monkeypatch.setattr(settings.sqlite3, "sqlite_version_info", (3, 51, 3))
    monkeypatch.setattr(settings, "_filesystem", lambda _folder, _mounts: "nfs4")
    assert settings.journal_mode(tmp_path / "x") == "delete"
    monkeypatch.setattr(settings, "_filesystem", lambda _folder, _mounts: "ext4")
    assert settings.journal_mode(tmp_path / "x") == "wal"


def test_the_innermost_mount_decides_what_is_local() -> None:
    mounts = ["/dev/sda / ext4 rw 0 0", "server:/x /data nfs4 rw 0 0", "tmp /data/fast\\040disk tmpfs rw 0 0"]
    assert settings._filesystem(Path("/home"), mounts) == "ext4"
    assert settings._filesystem(Path("/data/a"), mounts) == "nfs4"
    assert settings._filesystem(Path("/data/fast disk/b"), mounts) == "tmpfs"


def test_a_file_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE moz_places (id)")
    other.commit()
    other.close()
    before = path.read_bytes()
    for attempt in (lambda: Store.open(path), lambda: FastReader(path)):
        with pytest.raises(RegistryError, match="another program"):
            attempt()
    with pytest.raises(RegistryError, match="another program"), Store.unchecked(path) as store:
        schema.upgrade(store.engine, store.path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to be looked at " * 50)
    with pytest.raises(RegistryError, match="damaged or not a database"):
        Store.open(path)
    with pytest.raises(RegistryError, match="damaged or not a database"):
        FastReader(path)


@pytest.mark.parametrize(("version", "hint"), [(settings.SCHEMA_VERSION + 1, "pip install"), (0, "hubtool db upgrade")])
def test_another_schema_is_refused_with_the_next_step(store: Store, path: Path, version: int, hint: str) -> None:
    store.close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    for attempt in (lambda: Store.open(path), lambda: FastReader(path)):
        with pytest.raises(SchemaOutdated) as caught:
            attempt()
        assert hint in str(caught.value.hint)


def test_upgrade_of_a_newer_library_is_refused(store: Store, path: Path) -> None:
    store.close()
    sqlite3.connect(path).execute("PRAGMA user_version = 99").close()
    with pytest.raises(SchemaOutdated), Store.unchecked(path) as opened:
        schema.upgrade(opened.engine, opened.path)


def test_upgrade_of_the_newest_schema_changes_nothing(store: Store, path: Path) -> None:
    assert schema.upgrade(store.engine, path) == (schema.HEAD, schema.HEAD)
    assert schema.backups(path) == []


def test_upgrade_of_a_library_with_content_backs_it_up_first(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "HEAD", "later")
    monkeypatch.setattr(schema, "_migrate", lambda _connection: None)
    schema.upgrade(store.engine, path)
    assert len(schema.backups(path)) == 1


def test_a_migration_that_fails_changes_nothing(store: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(connection: object) -> None:
        connection.exec_driver_sql("DROP TABLE finding")  # type: ignore[attr-defined]
        raise RegistryError("no")

    monkeypatch.setattr(schema, "HEAD", "later")
    monkeypatch.setattr(schema, "_migrate", broken)
    with pytest.raises(RegistryError, match="no"):
        schema.upgrade(store.engine, path)
    assert "finding" in definitions(path)


def test_a_backup_is_a_whole_library_and_three_are_kept(store: Store, path: Path) -> None:
    made = [schema.backup(store.engine, path) for _ in range(5)]
    assert schema.backups(path) == made[2:]
    with Store.open(made[-1], create=False) as copy:
        assert schema.check(copy.engine, copy.path).ok


def test_a_backup_never_overwrites(store: Store, path: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine.sqlite3"
    schema.backup(store.engine, path, target)
    with pytest.raises(RegistryError, match="exists"):
        schema.backup(store.engine, path, target)


def test_check_finds_dangling_references(store: Store, path: Path) -> None:
    raw = sqlite3.connect(path)
    raw.execute("INSERT INTO artifact_doc VALUES (99, '', x'')")
    raw.commit()
    raw.close()
    result = schema.check(store.engine, path)
    assert not result.ok
    assert result.foreign_keys == ("artifact_doc row 99 -> artifact",)


def test_check_finds_damage(store: Store, path: Path) -> None:
    with store.transaction() as connection:
        for at in range(300):
            connection.execute(insert(models.tag), {"name": f"tag {at}", "name_key": f"tag {at}" * 20})
    store.close()
    content = bytearray(path.read_bytes())
    content[-6000:-2000] = b"\xff" * 4000
    path.write_bytes(content)
    with Store.unchecked(path) as opened:
        assert not healthy(opened)


def healthy(store: Store) -> bool:
    try:
        return schema.check(store.engine, store.path).ok
    except RegistryError:
        return False


def test_a_writer_that_cannot_get_the_lock_says_so(store: Store, path: Path) -> None:
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    impatient = Store.open(path, busy_ms=10)
    with pytest.raises(LibraryLocked) as caught, impatient.transaction():
        pass
    assert caught.value.exit_code == 5
    holder.close()
    with impatient.transaction():
        pass


def test_readers_work_while_a_writer_holds_the_lock(store: Store, path: Path) -> None:
    with store.transaction(), FastReader(path, busy_ms=10) as reader:
        assert reader.rows("SELECT COUNT(*) FROM artifact") == [(0,)]


def test_a_reader_cannot_write(store: Store, path: Path) -> None:
    with FastReader(path) as reader, pytest.raises(RegistryError, match="readonly"):
        reader.rows("DELETE FROM tag")


def test_a_transaction_that_raises_leaves_nothing(store: Store) -> None:
    def fail() -> None:
        with store.transaction() as connection:
            connection.execute(insert(models.tag), {"name": "x", "name_key": "x"})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert store.rows("SELECT COUNT(*) FROM tag") == [(0,)]


def test_two_processes_may_make_the_library_at_the_same_time(path: Path) -> None:
    code = "import sys; from hubtool.registry.store import Store; Store.open(sys.argv[1]).close()"
    both = [subprocess.Popen([sys.executable, "-c", code, str(path)], stderr=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate()[1] for process in both] == [b"", b""]
    with Store.open(path, create=False) as store:
        assert schema.check(store.engine, path).ok


def test_a_sqlite_url_is_a_path(path: Path) -> None:
    with Store.open(f"sqlite:///{path}") as store:
        assert store.path == path


def test_a_missing_database_driver_is_an_extra_to_install() -> None:
    from hubtool.errors import HubtoolError

    with pytest.raises(HubtoolError):
        make_engine("postgresql+no_such_driver://host/name")
