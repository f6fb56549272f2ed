"""The tables of migration 0002: where artifacts came from and went to, what hubs said about them, and the journal that ``undo`` reads.

``hub_origin`` ties an artifact to a file of a repository, ``publication`` is the receipt of one commit of ours. Answers of hubs are kept
raw: what hubtool reads out of them may improve, what they said must not be lost.
"""

from __future__ import annotations

from sqlalchemy import CheckConstraint, Column, ForeignKey, Index, Integer, LargeBinary, Text, UniqueConstraint

from hubtool.registry.models import Int, _key, _table, _to

hub_origin = _table(
    "hub_origin",
    _key(),
    _to("artifact"),
    Column("how", Text, CheckConstraint("how IN ('pulled', 'published', 'linked')", name="how"), nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("repo", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("revision", Text, nullable=False),  # what was asked for: a branch, tag, refs/pr/N or commit
    Column("commit_id", Text, nullable=False),
    Column("sha256", Text),
    Column("etag", Text),  # git blob sha1 of a file that is not in LFS
    Column("size", Int),
    Column("at", Int, nullable=False),
    UniqueConstraint("artifact_id", "endpoint", "repo", "path", "revision"),
    Index("ix_hub_origin_repo", "repo", "path"),
)

hub_card = _table(
    "hub_card",
    Column("endpoint", Text, primary_key=True),
    Column("repo", Text, primary_key=True),
    Column("commit_id", Text, nullable=False),
    Column("license", Text),
    Column("license_name", Text),
    Column("license_link", Text),
    Column("base_models", Text, nullable=False),  # JSON list
    Column("relation", Text),
    Column("trigger_words", Text, nullable=False),  # JSON list
    Column("raw", Text),  # the front matter or the whole card, as read
    Column("at", Int, nullable=False),
)

publication = _table(
    "publication",
    _key(),
    Column("endpoint", Text, nullable=False),
    Column("repo", Text, nullable=False),
    Column("revision", Text, nullable=False),
    Column("commit_id", Text, nullable=False),
    Column("parent_commit", Text),
    Column("pull_request", Text),
    Column("card", Text),
    Column("card_sha256", Text),
    Column("at", Int, nullable=False),
    Index("ix_publication_repo", "repo", "at"),
)

publication_file = _table(
    "publication_file",
    _to("publication", primary=True),
    Column("path", Text, primary_key=True),
    Column("sha256", Text, nullable=False),
    Column("etag", Text),
    Column("size", Int, nullable=False),
    Column("artifact_id", Integer, ForeignKey("artifact.id", ondelete="SET NULL")),
    Index("ix_publication_file_artifact", "artifact_id"),
)

civitai_answer = _table(
    "civitai_answer",
    Column("sha256", Text, primary_key=True),
    Column("source", Text, nullable=False),  # base URL of the API that answered
    Column("status", Integer, nullable=False),  # 200, or 404 for "asked, not known there"
    Column("body", LargeBinary),  # deflated JSON exactly as received; a later 404 leaves it
    Column("fetched_at", Int, nullable=False),
    Column("expires_at", Int, nullable=False),
)

journal = _table(
    "journal",
    _key(),
    Column("uid", Text, nullable=False, unique=True),
    Column("command", Text, nullable=False),
    Column("summary", Text, nullable=False),
    Column("state", Text, CheckConstraint("state IN ('open', 'done', 'undone')", name="state"), nullable=False),
    Column("at", Int, nullable=False),
    Column("undone_at", Int),
)

journal_step = _table(
    "journal_step",
    _to("journal", primary=True),
    Column("position", Integer, primary_key=True),
    Column("op", Text, nullable=False),
    Column("done", Integer, nullable=False, server_default="0"),
    Column("details", Text, nullable=False),  # JSON: what undo needs
)
