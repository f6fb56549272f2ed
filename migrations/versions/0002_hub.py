"""Hubs: origins, cards, publications, Civitai's answers; and the journal of ``undo``."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TABLES = (
    "civitai_answer",
    "hub_card",
    "hub_origin",
    "journal",
    "journal_step",
    "publication",
    "publication_file",
)


def _table(name: str, *items: sa.schema.SchemaItem) -> None:
    op.create_table(name, *items, sqlite_strict=True)


def _hub_origin() -> None:
    _table(
        "hub_origin",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("artifact_id", sa.Integer, sa.ForeignKey("artifact.id", ondelete="CASCADE"), nullable=False),
        sa.Column("how", sa.Text, nullable=False),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("repo", sa.Text, nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("revision", sa.Text, nullable=False),
        sa.Column("commit_id", sa.Text, nullable=False),
        sa.Column("sha256", sa.Text),
        sa.Column("etag", sa.Text),
        sa.Column("size", Int),
        sa.Column("at", Int, nullable=False),
        sa.CheckConstraint("how IN ('pulled', 'published', 'linked')", name="how"),
        sa.UniqueConstraint("artifact_id", "endpoint", "repo", "path", "revision"),
    )
    op.create_index("ix_hub_origin_repo", "hub_origin", ["repo", "path"])


def _hub_card() -> None:
    _table(
        "hub_card",
        sa.Column("endpoint", sa.Text, primary_key=True),
        sa.Column("repo", sa.Text, primary_key=True),
        sa.Column("commit_id", sa.Text, nullable=False),
        sa.Column("license", sa.Text),
        sa.Column("license_name", sa.Text),
        sa.Column("license_link", sa.Text),
        sa.Column("base_models", sa.Text, nullable=False),
        sa.Column("relation", sa.Text),
        sa.Column("trigger_words", sa.Text, nullable=False),
        sa.Column("raw", sa.Text),
        sa.Column("at", Int, nullable=False),
    )


def _publication() -> None:
    _table(
        "publication",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("repo", sa.Text, nullable=False),
        sa.Column("revision", sa.Text, nullable=False),
        sa.Column("commit_id", sa.Text, nullable=False),
        sa.Column("parent_commit", sa.Text),
        sa.Column("pull_request", sa.Text),
        sa.Column("card", sa.Text),
        sa.Column("card_sha256", sa.Text),
        sa.Column("at", Int, nullable=False),
    )
    op.create_index("ix_publication_repo", "publication", ["repo", "at"])


def _publication_file() -> None:
    _table(
        "publication_file",
        sa.Column("publication_id", sa.Integer, sa.ForeignKey("publication.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("path", sa.Text, primary_key=True),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("etag", sa.Text),
        sa.Column("size", Int, nullable=False),
        sa.Column("artifact_id", sa.Integer, sa.ForeignKey("artifact.id", ondelete="SET NULL")),
    )
    op.create_index("ix_publication_file_artifact", "publication_file", ["artifact_id"])


def _civitai_answer() -> None:
    _table(
        "civitai_answer",
        sa.Column("sha256", sa.Text, primary_key=True),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("body", sa.LargeBinary),
        sa.Column("fetched_at", Int, nullable=False),
        sa.Column("expires_at", Int, nullable=False),
    )


def _journal() -> None:
    _table(
        "journal",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("uid", sa.Text, nullable=False, unique=True),
        sa.Column("command", sa.Text, nullable=False),
        sa.Column("summary", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("at", Int, nullable=False),
        sa.Column("undone_at", Int),
        sa.CheckConstraint("state IN ('open', 'done', 'undone')", name="state"),
    )
    _table(
        "journal_step",
        sa.Column("journal_id", sa.Integer, sa.ForeignKey("journal.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("op", sa.Text, nullable=False),
        sa.Column("done", sa.Integer, nullable=False, server_default="0"),
        sa.Column("details", sa.Text, nullable=False),
    )


def upgrade() -> None:
    _hub_origin()
    _hub_card()
    _publication()
    _publication_file()
    _civitai_answer()
    _journal()


def downgrade() -> None:
    for name in reversed(TABLES):
        op.drop_table(name)
