"""The first schema: roots, artifacts, locations, hashes, findings, trigger words, lineage; entries, tags and meta for user data."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Real = sa.Double().with_variant(sa.REAL(), "sqlite")
LIVE = sa.text("state IN ('present', 'offline')")
TABLES = (
    "artifact",
    "entry",
    "root",
    "tag",
    "artifact_doc",
    "entry_artifact",
    "entry_tag",
    "hash",
    "lineage",
    "location",
    "meta",
    "trigger_word",
    "finding",
)


def _table(name: str, *items: sa.schema.SchemaItem) -> None:
    op.create_table(name, *items, sqlite_strict=True)


def _root() -> None:
    _table(
        "root",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("path", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("path_text", sa.Text, nullable=False),
        sa.Column("path_key", sa.Text, nullable=False),
        sa.Column("device", Int),
        sa.Column("inode", Int),
        sa.Column("online", sa.Integer, nullable=False, server_default="1"),
        sa.Column("walked", sa.Integer, nullable=False, server_default="1"),
        sa.Column("added_at", Int, nullable=False),
        sa.Column("last_scan_at", Int),
    )


def _artifact() -> None:
    _table(
        "artifact",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("uid", sa.Text, nullable=False, unique=True),
        sa.Column("form", sa.Text, nullable=False),
        sa.Column("size", Int, nullable=False),
        sa.Column("format", sa.Text, nullable=False),
        sa.Column("quick_id", sa.Text),
        sa.Column("sha256", sa.Text),
        sa.Column("payload_sha256", sa.Text),
        sa.Column("content_id", sa.Text),
        sa.Column("health", sa.Text, nullable=False),
        sa.Column("kind", sa.Text),
        sa.Column("algorithm", sa.Text),
        sa.Column("family", sa.Text),
        sa.Column("layout", sa.Text),
        sa.Column("base_model", sa.Text),
        sa.Column("base_key", sa.Text),
        sa.Column("title", sa.Text),
        sa.Column("title_key", sa.Text),
        sa.Column("dtypes", sa.Text, nullable=False),
        sa.Column("tensors", Int),
        sa.Column("parameters", Int),
        sa.Column("rank", Int),
        sa.Column("alpha", Real),
        sa.Column("added_at", Int, nullable=False),
        sa.CheckConstraint("form IN ('file', 'folder', 'sharded')", name="form"),
        sa.CheckConstraint("health IN ('ok', 'suspect', 'corrupt', 'unreadable')", name="health"),
    )
    op.create_index("ix_artifact_content", "artifact", ["content_id"])
    op.create_index("ix_artifact_facets", "artifact", ["kind", "family", "algorithm"])
    op.create_index("ix_artifact_payload", "artifact", ["payload_sha256"])
    op.create_index("ix_artifact_quick", "artifact", ["quick_id"])
    op.create_index("ix_artifact_size", "artifact", ["size"])
    op.create_index(
        "ux_artifact_sha256", "artifact", ["sha256"], unique=True, sqlite_where=sa.text("sha256 IS NOT NULL")
    )


def _artifact_doc() -> None:
    _table(
        "artifact_doc",
        sa.Column("artifact_id", sa.Integer, sa.ForeignKey("artifact.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("search_text", sa.Text, nullable=False),
        sa.Column("identity", sa.LargeBinary, nullable=False),
    )


def _location() -> None:
    _table(
        "location",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("artifact_id", sa.Integer, sa.ForeignKey("artifact.id", ondelete="RESTRICT"), nullable=False),
        sa.Column("root_id", sa.Integer, sa.ForeignKey("root.id", ondelete="RESTRICT"), nullable=False),
        sa.Column("relpath", sa.LargeBinary, nullable=False),
        sa.Column("path_text", sa.Text, nullable=False),
        sa.Column("path_key", sa.Text, nullable=False),
        sa.Column("name_key", sa.Text, nullable=False),
        sa.Column("size", Int, nullable=False),
        sa.Column("mtime_ns", Int, nullable=False),
        sa.Column("inode", Int, nullable=False),
        sa.Column("device", Int, nullable=False),
        sa.Column("links", sa.Integer, nullable=False),
        sa.Column("link", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("first_seen_at", Int, nullable=False),
        sa.Column("missing_since", Int),
        sa.Column("verified_at", Int),
        sa.CheckConstraint("link IN ('file', 'symlink', 'folder')", name="link"),
        sa.CheckConstraint("state IN ('present', 'offline', 'missing', 'trashed', 'superseded')", name="state"),
    )
    op.create_index("ix_location_artifact", "location", ["artifact_id", "state"])
    op.create_index("ix_location_inode", "location", ["inode"])
    op.create_index(
        "ux_location_live", "location", ["root_id", "relpath"], unique=True, sqlite_where=LIVE, postgresql_where=LIVE
    )


def _hash() -> None:
    _table(
        "hash",
        sa.Column("algo", sa.Text, primary_key=True),
        sa.Column("value", sa.Text, primary_key=True),
        sa.Column("artifact_id", sa.Integer, sa.ForeignKey("artifact.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("origin", sa.Text, primary_key=True),
        sa.Column("at", Int, nullable=False),
        sa.CheckConstraint("origin IN ('computed', 'embedded', 'hub', 'sidecar')", name="origin"),
    )
    op.create_index("ix_hash_artifact", "hash", ["artifact_id"])
    op.create_index("ix_hash_value", "hash", ["value"])


def _finding() -> None:
    _table(
        "finding",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("artifact_id", sa.Integer, sa.ForeignKey("artifact.id", ondelete="CASCADE"), nullable=False),
        sa.Column("location_id", sa.Integer, sa.ForeignKey("location.id", ondelete="CASCADE")),
        sa.Column("code", sa.Text, nullable=False),
        sa.Column("severity", sa.Text, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("at", Int, nullable=False),
        sa.CheckConstraint("severity IN ('info', 'warning', 'error')", name="severity"),
    )
    op.create_index("ix_finding_artifact", "finding", ["artifact_id"])
    op.create_index("ix_finding_code", "finding", ["severity", "code"])


def _trigger_word() -> None:
    _table(
        "trigger_word",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("artifact_id", sa.Integer, sa.ForeignKey("artifact.id", ondelete="CASCADE"), nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("text_key", sa.Text, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.UniqueConstraint("artifact_id", "text", "source"),
    )
    op.create_index("ix_trigger_word_key", "trigger_word", ["text_key"])


def _lineage() -> None:
    _table(
        "lineage",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("child_id", sa.Integer, sa.ForeignKey("artifact.id", ondelete="CASCADE"), nullable=False),
        sa.Column("parent_id", sa.Integer, sa.ForeignKey("artifact.id", ondelete="SET NULL")),
        sa.Column("parent_ref", sa.Text, nullable=False),
        sa.Column("op", sa.Text, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("strength", Real),
        sa.Column("params", sa.Text),
        sa.Column("tool", sa.Text, nullable=False),
        sa.Column("at", Int, nullable=False),
    )
    op.create_index("ix_lineage_child", "lineage", ["child_id"])
    op.create_index("ix_lineage_parent", "lineage", ["parent_id"])


def _entry() -> None:
    _table(
        "entry",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("uid", sa.Text, nullable=False, unique=True),
        sa.Column("title", sa.Text),
        sa.Column("notes", sa.Text),
        sa.Column("rating", sa.Integer),
        sa.Column("favorite", sa.Integer, nullable=False, server_default="0"),
        sa.Column("search_text", sa.Text, nullable=False, server_default=""),
        sa.Column("added_at", Int, nullable=False),
        sa.Column("updated_at", Int, nullable=False),
        sa.CheckConstraint("rating BETWEEN 0 AND 5", name="rating"),
    )


def _tag() -> None:
    _table(
        "tag",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("name_key", sa.Text, nullable=False, unique=True),
    )


def _entry_artifact() -> None:
    _table(
        "entry_artifact",
        sa.Column("entry_id", sa.Integer, sa.ForeignKey("entry.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("artifact_id", sa.Integer, sa.ForeignKey("artifact.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("role", sa.Text, nullable=False),
        sa.CheckConstraint("role IN ('primary', 'variant', 'previous')", name="role"),
    )
    op.create_index("ix_entry_artifact_artifact", "entry_artifact", ["artifact_id"])


def _entry_tag() -> None:
    _table(
        "entry_tag",
        sa.Column("entry_id", sa.Integer, sa.ForeignKey("entry.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("tag_id", sa.Integer, sa.ForeignKey("tag.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("source", sa.Text, primary_key=True),
    )
    op.create_index("ix_entry_tag_tag", "entry_tag", ["tag_id"])


def _meta() -> None:
    _table(
        "meta",
        sa.Column("entry_id", sa.Integer, sa.ForeignKey("entry.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("field", sa.Text, primary_key=True),
        sa.Column("source", sa.Text, primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
        sa.Column("at", Int, nullable=False),
    )


def upgrade() -> None:
    _artifact()
    _entry()
    _root()
    _tag()
    _artifact_doc()
    _entry_artifact()
    _entry_tag()
    _hash()
    _lineage()
    _location()
    _meta()
    _trigger_word()
    _finding()


def downgrade() -> None:
    for name in reversed(TABLES):
        op.drop_table(name)
