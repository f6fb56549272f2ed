"""The tables (SQLAlchemy Core; no ORM, whose import alone costs a second scan its budget).

``artifact`` is bytes with an identity, ``location`` a place where they lie, ``entry`` what a person says about artifacts: user data
hangs on entries, never on a path. Rows are retired by ``state``; a scan deletes nothing. Computed, embedded and claimed hashes are
rows of ``hash`` told apart by ``origin``. Portable: SQLite's STRICT and partial indexes are options that PostgreSQL reads its own way.
"""

from __future__ import annotations

from sqlalchemy import (
    REAL,
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.sql.schema import SchemaItem
from sqlalchemy.types import TypeEngine

CONVENTION = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}
metadata = MetaData(naming_convention=CONVENTION)

Int = BigInteger().with_variant(Integer(), "sqlite")  # STRICT tables know INTEGER only, and it has 64 bits there
Real: TypeEngine[float] = Double().with_variant(REAL(), "sqlite")
LIVE = text("state IN ('present', 'offline')")


def _table(name: str, *items: SchemaItem) -> Table:
    return Table(name, metadata, *items, sqlite_strict=True)


def _key() -> Column[int]:
    return Column("id", Integer, primary_key=True)


def _to(
    target: str, *, name: str | None = None, optional: bool = False, keep: bool = False, primary: bool = False
) -> Column[int]:
    """A foreign key to ``target``.id; rows go with their parent unless ``keep``."""
    rule = ForeignKey(f"{target}.id", ondelete="RESTRICT" if keep else "CASCADE")
    return Column(name or f"{target}_id", Integer, rule, nullable=optional, primary_key=primary)


root = _table(
    "root",
    _key(),
    Column("path", LargeBinary, nullable=False, unique=True),
    Column("path_text", Text, nullable=False),
    Column("path_key", Text, nullable=False),
    Column("device", Int),
    Column("inode", Int),
    Column("online", Integer, nullable=False, server_default="1"),
    Column("walked", Integer, nullable=False, server_default="1"),  # 0: single files were named, the folder was not
    Column("added_at", Int, nullable=False),
    Column("last_scan_at", Int),
)

artifact = _table(
    "artifact",
    _key(),
    Column("uid", Text, nullable=False, unique=True),
    Column("form", Text, CheckConstraint("form IN ('file', 'folder', 'sharded')", name="form"), nullable=False),
    Column("size", Int, nullable=False),
    Column("format", Text, nullable=False),
    Column("quick_id", Text),
    Column("sha256", Text),
    Column("payload_sha256", Text),
    Column("content_id", Text),
    Column(
        "health",
        Text,
        CheckConstraint("health IN ('ok', 'suspect', 'corrupt', 'unreadable')", name="health"),
        nullable=False,
    ),
    Column("kind", Text),
    Column("algorithm", Text),
    Column("family", Text),
    Column("layout", Text),
    Column("base_model", Text),
    Column("base_key", Text),
    Column("title", Text),
    Column("title_key", Text),
    Column("dtypes", Text, nullable=False),
    Column("tensors", Int),
    Column("parameters", Int),
    Column("rank", Int),
    Column("alpha", Real),
    Column("added_at", Int, nullable=False),
    Index("ux_artifact_sha256", "sha256", unique=True, sqlite_where=text("sha256 IS NOT NULL")),
    Index("ix_artifact_quick", "quick_id"),
    Index("ix_artifact_payload", "payload_sha256"),
    Index("ix_artifact_content", "content_id"),
    Index("ix_artifact_facets", "kind", "family", "algorithm"),
    Index("ix_artifact_size", "size"),
)

artifact_doc = _table(  # apart from artifact: listings never read these long values
    "artifact_doc",
    _to("artifact", primary=True),
    Column("search_text", Text, nullable=False),
    Column("identity", LargeBinary, nullable=False),
)

location = _table(
    "location",
    _key(),
    _to("artifact", keep=True),
    _to("root", keep=True),
    Column("relpath", LargeBinary, nullable=False),
    Column("path_text", Text, nullable=False),
    Column("path_key", Text, nullable=False),
    Column("name_key", Text, nullable=False),
    Column("size", Int, nullable=False),
    Column("mtime_ns", Int, nullable=False),
    Column("inode", Int, nullable=False),
    Column("device", Int, nullable=False),
    Column("links", Integer, nullable=False),
    Column("link", Text, CheckConstraint("link IN ('file', 'symlink', 'folder')", name="link"), nullable=False),
    Column(
        "state",
        Text,
        CheckConstraint("state IN ('present', 'offline', 'missing', 'trashed', 'superseded')", name="state"),
        nullable=False,
    ),
    Column("first_seen_at", Int, nullable=False),
    Column("missing_since", Int),
    Column("verified_at", Int),  # when these very bytes were last hashed; NULL queues them
    Index("ux_location_live", "root_id", "relpath", unique=True, sqlite_where=LIVE, postgresql_where=LIVE),
    Index("ix_location_artifact", "artifact_id", "state"),
    Index("ix_location_inode", "inode"),
)

hash_ = _table(
    "hash",
    Column("algo", Text, primary_key=True),
    Column("value", Text, primary_key=True),
    _to("artifact", primary=True),
    Column(
        "origin",
        Text,
        CheckConstraint("origin IN ('computed', 'embedded', 'hub', 'sidecar')", name="origin"),
        primary_key=True,
    ),
    Column("at", Int, nullable=False),
    Index("ix_hash_artifact", "artifact_id"),
    Index("ix_hash_value", "value"),
)

finding = _table(
    "finding",
    _key(),
    _to("artifact"),
    _to("location", optional=True),
    Column("code", Text, nullable=False),
    Column(
        "severity", Text, CheckConstraint("severity IN ('info', 'warning', 'error')", name="severity"), nullable=False
    ),
    Column("message", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("at", Int, nullable=False),
    Index("ix_finding_artifact", "artifact_id"),
    Index("ix_finding_code", "severity", "code"),
)

trigger_word = _table(
    "trigger_word",
    _key(),
    _to("artifact"),
    Column("text", Text, nullable=False),
    Column("text_key", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("position", Integer, nullable=False),
    UniqueConstraint("artifact_id", "text", "source"),
    Index("ix_trigger_word_key", "text_key"),
)

lineage = _table(
    "lineage",
    _key(),
    _to("artifact", name="child_id"),
    Column("parent_id", Integer, ForeignKey("artifact.id", ondelete="SET NULL")),
    Column("parent_ref", Text, nullable=False),
    Column("op", Text, nullable=False),
    Column("position", Integer, nullable=False),
    Column("strength", Real),
    Column("params", Text),
    Column("tool", Text, nullable=False),
    Column("at", Int, nullable=False),
    Index("ix_lineage_child", "child_id"),
    Index("ix_lineage_parent", "parent_id"),
)

entry = _table(
    "entry",
    _key(),
    Column("uid", Text, nullable=False, unique=True),
    Column("title", Text),
    Column("notes", Text),
    Column("rating", Integer, CheckConstraint("rating BETWEEN 0 AND 5", name="rating")),
    Column("favorite", Integer, nullable=False, server_default="0"),
    Column("search_text", Text, nullable=False, server_default=""),
    Column("added_at", Int, nullable=False),
    Column("updated_at", Int, nullable=False),
)

entry_artifact = _table(
    "entry_artifact",
    _to("entry", primary=True),
    _to("artifact", primary=True),
    Column("role", Text, CheckConstraint("role IN ('primary', 'variant', 'previous')", name="role"), nullable=False),
    Index("ix_entry_artifact_artifact", "artifact_id"),
)

tag = _table(
    "tag",
    _key(),
    Column("name", Text, nullable=False),
    Column("name_key", Text, nullable=False, unique=True),
)

entry_tag = _table(
    "entry_tag",
    _to("entry", primary=True),
    _to("tag", primary=True),
    Column("source", Text, primary_key=True),
    Index("ix_entry_tag_tag", "tag_id"),
)

meta = _table(
    "meta",
    _to("entry", primary=True),
    Column("field", Text, primary_key=True),
    Column("source", Text, primary_key=True),
    Column("value", Text, nullable=False),
    Column("at", Int, nullable=False),
)
