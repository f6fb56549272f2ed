"""What Civitai says is a stranger's text: made harmless where it is kept for pages, plain where it is printed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from hubtool.actions.civitai import look_up
from hubtool.actions.library import open_store
from hubtool.cli.main import cli
from hubtool.hub import civitai_text
from hubtool.registry import browse
from tests.support.civitai_server import CivitaiServer, civitai_server

if TYPE_CHECKING:
    from tests.support.hub import LocalHub  # pytest_plugins imports it first

pytest_plugins = ["tests.support.hub", "tests.support.linked"]

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '<a href="javascript:alert(1)">x</a>',
    '<a href="data:text/html,x">x</a>',
    '<iframe src="https://x"></iframe>',
    "<svg/onload=alert(1)>",
    '<p style="background:url(https://x)">x</p>',
    "<math><mtext><style><img src=x onerror=alert(1)>",
    '<a href="//evil.example">x</a>',
]


@pytest.mark.parametrize("text", HOSTILE)
def test_html_loses_everything_that_could_act(text: str) -> None:
    clean = civitai_text.sanitise(text).lower()
    assert not any(
        mark in clean
        for mark in ("<script", "onerror", "onload", "javascript:", "data:", "<i" + "frame", "<img", "style", "//evil")
    )


def test_html_keeps_simple_markup_and_web_links() -> None:
    kept = civitai_text.sanitise('<p>Use <strong>0.8</strong>, see <a href="https://x.example/a">this</a></p>')
    assert (
        kept
        == '<p>Use <strong>0.8</strong>, see <a href="https://x.example/a" rel="noopener noreferrer nofollow ugc">this</a></p>'
    )


def test_html_becomes_plain_text() -> None:
    text = civitai_text.plain("<p>One &lt;lora:x:1&gt; &amp;  two</p><ul><li>a</li><li>b</li></ul><script>x</script>")
    assert text == "One <lora:x:1> & two\na\nb"


def test_files_that_are_no_list_prove_nothing() -> None:
    for files in (None, 3, [3], [{"hashes": 3}], [{"hashes": {"SHA256": 3}}], [{"hashes": {"SHA256": "zz"}}]):
        assert civitai_text.find_file({"files": files}, {"sha256": "ab" * 32}) == ({}, None)


def test_the_hash_of_no_tensors_names_nothing() -> None:
    document = {"files": [{"hashes": {"AutoV3": civitai_text.EMPTY.upper()}}]}
    assert civitai_text.find_file(document, {"payload_sha256": civitai_text.EMPTY + "0" * 52}) == ({}, None)


@pytest.fixture
def civitai(monkeypatch: pytest.MonkeyPatch) -> Iterator[CivitaiServer]:
    with civitai_server() as running:
        monkeypatch.setenv("HUBTOOL_CIVITAI", running.url)
        yield running


def test_show_tells_what_hubs_said_without_their_markup(linked: LocalHub, civitai: CivitaiServer, file: Path) -> None:
    with open_store() as store:
        digest = browse.find(store, str(file)).sha256 or ""
        civitai.add(digest, 7, description="<p>Use \x1b[31mred\x1b[0m <b>now</b></p>" + HOSTILE[0] * 30)
        look_up(store)
    shown = CliRunner().invoke(cli, ["show", str(file)]).stdout
    assert "linked: hf://tester/style/style.safetensors at " in shown
    assert "Civitai: Style 7 v7.0 https://civitai.com/models/1007" in shown
    assert "Use \\x1b[31mred" in shown
    assert "<" not in shown.split("Civitai: ")[1]
    document = json.loads(CliRunner().invoke(cli, ["show", str(file), "--json"]).stdout)
    html = document["hub"]["civitai"]["description_html"]
    assert "<b>now</b>" in html
    assert "script" not in html


def test_a_long_description_is_cut(linked: LocalHub, civitai: CivitaiServer, file: Path) -> None:
    with open_store() as store:
        text = "".join(f"<p>line {at}</p>" for at in range(40))
        civitai.add(browse.find(store, str(file)).sha256 or "", 7, description=text)
        look_up(store)
    shown = CliRunner().invoke(cli, ["show", str(file)]).stdout
    assert "line 11" in shown
    assert "line 12" not in shown
    assert "more lines: --json has them" in shown
