"""A scanned folder with one LoRA, and a hub on loopback that has the same file: what the tests of ``outdated`` and ``sync`` begin with.

pytest_plugins = ["tests.support.hub", "tests.support.linked"]
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.linking import FILE, REPO, lora, rescan, tie

if TYPE_CHECKING:
    from tests.support.hub import LocalHub  # pytest_plugins imports it first


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The folder."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / FILE).write_bytes(lora(1))
    rescan(folder)
    return folder


@pytest.fixture
def file(models: Path) -> Path:
    """The LoRA in it."""
    return models / FILE


@pytest.fixture
def linked(hub: LocalHub, file: Path) -> LocalHub:
    """The hub, with the file in ``REPO`` and the two linked."""
    hub.put(REPO, {FILE: lora(1), "README.md": "# Style"})
    tie(file, REPO)
    return hub
