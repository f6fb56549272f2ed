"""README.md says what the code does: its blocks are generated, and its commands exist."""

from __future__ import annotations

import re

import pytest

from hubtool.cli.main import _modules
from tests.readme import BLOCK, BLOCKS, CHECKOUT, README, regenerate

TEXT = README.read_text("utf-8")


def test_the_blocks_are_up_to_date() -> None:
    assert regenerate(TEXT) == TEXT, "run: make docs"


def test_every_block_has_a_generator() -> None:
    assert {name for _, name, _ in BLOCK.findall(TEXT)} <= set(BLOCKS)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_generator_makes_text(name: str) -> None:
    assert BLOCKS[name]().strip()


def test_every_command_that_is_mentioned_exists() -> None:
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", TEXT, re.DOTALL))
    mentioned = set(re.findall(r"^[`$ ]*hubtool (?:--?\S+ )*([a-z][a-z-]+)", code, re.MULTILINE))
    assert mentioned <= set(_modules())


def test_every_file_that_is_linked_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)", TEXT)
    assert not [link for link in links if "://" not in link and not (CHECKOUT / link).exists()]
