"""card: write the model card of an artifact alone, or check one that is there. Nothing is published."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubtool.actions.publish import drafted
from hubtool.actions.publish_facts import Said, listed
from hubtool.actions.publish_result import Options
from hubtool.errors import FileError, FileMissing, UsageProblem
from hubtool.hub import card_text, cards, validation
from hubtool.hub.layout import CARD, INDEX
from hubtool.hub.privacy import Cleaning
from hubtool.hub.refs import HUGGING_FACE, HubRef, parse_ref
from hubtool.hub.uploads import read_index
from hubtool.tensors.atomic import atomic_file
from hubtool.types import Finding

if TYPE_CHECKING:
    from hubtool.hub.client import Client

_MAX_CARD = 2 << 20
_SLUG = re.compile(r"[^A-Za-z0-9.]+")


@dataclass(frozen=True, slots=True)
class Written:
    """A card that was or would be written. ``output`` None: only shown. ``kept``: what a person wrote and was left alone."""

    text: str
    output: Path | None
    diff: str
    kept: tuple[str, ...]
    findings: tuple[Finding, ...]
    changed: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "card": self.text,
            "output": None if self.output is None else str(self.output),
            "changed": self.changed,
            "diff": self.diff,
            "kept": list(self.kept),
            "findings": [finding.to_json() for finding in self.findings],
        }


@dataclass(frozen=True, slots=True)
class Checked:
    """What is wrong with a card."""

    path: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return not any(finding.severity == "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "ok": self.ok, "findings": [finding.to_json() for finding in self.findings]}


def write_card(
    ref: str, output: Path | None = None, *, repo: str | None = None, said: Said | None = None, options: Options | None = None
) -> Written:  # fmt: skip
    """Make the card of an artifact; a card that is at ``output`` already keeps what a person wrote into it.

    ``repo``: where it will be published, for links and the snippet. Raises what opening and converting raise.
    """
    said, options = said or Said(), options or Options()
    name = repo or f"OWNER/{_SLUG.sub('-', Path(ref).stem).strip('-.') or 'name'}"
    with drafted([ref], validation.check_repo(name), HUGGING_FACE, said, options) as draft:
        ours = card_text.card(replace(draft.facts, files=listed(draft.made.uploads, ())))
        findings = [*draft.cleaner.cleaning.findings(), *draft.cleaner.findings]
        names = {one.path for one in draft.made.uploads}
    before = _existing(output)
    there = None if before is None else cards.parse(before, str(output))
    merged = cards.merge(there, ours, _record(output), said.forced)
    text = str(merged.card)
    found = (*findings, *validation.check_front(merged.card.front), *validation.check_body(merged.card.body, names))
    if output is not None and text != before and not options.dry_run:
        data = text.encode()
        with atomic_file(output, len(data), force=True) as file:
            file.write(data)
    diff = cards.difference(before, text, output.name if output else CARD)
    return Written(text, output, diff, merged.kept, tuple(dict.fromkeys(found)), text != before)


def _existing(output: Path | None) -> str | None:
    return None if output is None or not output.exists() else _read(output)


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_CARD:
            raise FileError("too large for a model card", path=path)
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise FileMissing("no such file", path=path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read the card: {error}", path=path) from error


def _record(output: Path | None) -> cards.Record | None:
    """What hubtool wrote last, where the index of the publication lies beside the card."""
    index = output.with_name(INDEX) if output else None
    if index is None or not index.is_file():
        return None
    return cards.read_record(read_index(index.read_bytes()).get("card"))


def is_card(ref: str) -> bool:
    """Whether a REF names a card, not an artifact: a Markdown file, or a repository of a hub."""
    return ref.lower().endswith((".md", ".markdown")) or ref.startswith("hf://")


def check_card(ref: str, *, client: Client | None = None) -> Checked:
    """Check a card offline (a file), or that of a repository (``hf://owner/name``). Raises ``FileError``, ``CorruptFile``, ``HubError``."""
    if ref.startswith("hf://"):
        return _check_remote(parse_ref(ref), client)
    path = Path(ref)
    text = _read(path)
    beside = {
        os.path.relpath(os.path.join(root, name), path.parent)
        for root, _, names in os.walk(path.parent)
        for name in names
    }
    alone = beside <= {path.name}
    return Checked(ref, _findings(text, None if alone else beside, ref))


def _check_remote(ref: HubRef, client: Client | None) -> Checked:
    from hubtool.hub.client import Client as Made
    from hubtool.hub.publishing import Repository

    if ref.path not in (None, CARD):
        raise UsageProblem(f"{ref} is no card", hint=f"hf://{ref.repo}")
    remote = Repository(client or Made(), ref).remote()
    if remote.card is None:
        said = (
            "there is no repository of this name that this account can read"
            if remote.head is None
            else "there is no card"
        )
        raise FileMissing(said, path=str(ref))
    return Checked(str(ref), _findings(remote.card, set(remote.files), str(ref)))


def _findings(text: str, files: Collection[str] | None, path: str) -> tuple[Finding, ...]:
    card = cards.parse(text, path)
    cleaning = Cleaning()
    cleaning.text(text, path)
    named = () if files is None else validation.check_files(card.front, files)
    found = (*validation.check_front(card.front), *named, *validation.check_body(card.body, files))
    return (*cleaning.findings(), *found)
