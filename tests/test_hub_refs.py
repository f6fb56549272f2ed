"""References to a hub: every spelling, and nothing that could lead elsewhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubtool.errors import UnsafeFile, UsageProblem
from hubtool.hub.refs import HubRef, is_hub_ref, is_safe, parse_ref, safe_path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPELLINGS = {
    "owner/name": HubRef("owner", "name"),
    "hf://owner/name": HubRef("owner", "name"),
    "hf://models/owner/name": HubRef("owner", "name"),
    "hf://owner/name/": HubRef("owner", "name"),
    "owner/name@v1.0": HubRef("owner", "name", "v1.0"),
    "hf://owner/name/a.safetensors": HubRef("owner", "name", None, "a.safetensors"),
    "hf://owner/name@dev/sub/a b.safetensors": HubRef("owner", "name", "dev", "sub/a b.safetensors"),
    "hf://owner/name@feature%2Fx/a": HubRef("owner", "name", "feature/x", "a"),
    "hf://owner/name@refs/pr/3": HubRef("owner", "name", "refs/pr/3"),
    "hf://owner/name@refs/pr/3/sub/a": HubRef("owner", "name", "refs/pr/3", "sub/a"),
    f"owner/name@{COMMIT}/a": HubRef("owner", "name", COMMIT, "a"),
    "https://huggingface.co/owner/name": HubRef("owner", "name"),
    "https://huggingface.co/owner/name/tree/main": HubRef("owner", "name", "main"),
    "https://huggingface.co/owner/name/blob/main/sub/a%20b.safetensors": HubRef("owner", "name", "main", "sub/a b.safetensors"),
    "https://hf.co/owner/name/resolve/refs%2Fpr%2F3/a?download=true": HubRef("owner", "name", "refs/pr/3", "a"),
    "https://huggingface.co/owner/name/resolve/refs/pr/3/a": HubRef("owner", "name", "refs/pr/3", "a"),
}  # fmt: skip


@pytest.mark.parametrize("text", SPELLINGS)
def test_a_reference_is_read_in_every_spelling(text: str) -> None:
    assert parse_ref(text) == SPELLINGS[text]


@pytest.mark.parametrize("ref", SPELLINGS.values(), ids=str)
def test_a_reference_is_written_as_it_is_read(ref: HubRef) -> None:
    assert parse_ref(str(ref)) == ref


@pytest.mark.parametrize(
    "text",
    [
        "", "name", "hf://", "hf://name", "owner/", "/name", "a/b c", "../x", "a/..", "a--b/c", "a/b.git", "-a/b", "a/b@", "a/b@x y",
        "a/b@x^/c", "a/b/../c", "a/b//c", "a/b/./c", "a/b/c\\d", "a/b/\0", "hf://datasets/a/b", "spaces/a/b", "https://huggingface.co/a",
        "https://huggingface.co/a/b/discussions/1",
    ],
)  # fmt: skip
def test_what_is_no_reference_is_refused_with_the_right_form(text: str) -> None:
    with pytest.raises(UsageProblem) as caught:
        parse_ref(text)
    assert "hf://owner/name" in str(caught.value.hint)


@pytest.mark.parametrize("text", ["hf://a/b", "https://huggingface.co/a/b", "http://127.0.0.1:9/a/b"])
def test_a_hub_reference_is_told_from_a_path(text: str) -> None:
    assert is_hub_ref(text, "http://127.0.0.1:9/")
    assert not is_hub_ref("a/b")
    assert not is_hub_ref("https://example.org/a/b")


def test_an_address_of_the_own_endpoint_is_a_reference() -> None:
    assert parse_ref("http://hub.local/a/b/blob/v1/c", "http://hub.local/") == HubRef("a", "b", "v1", "c")


@pytest.mark.parametrize("path", ["/", "//", "///", "/a", "", ".", "..", "a/../b", "a//b", "a/", "./a", "C:/a", "a\0b"])
def test_these_paths_are_not_safe(path: str) -> None:
    assert not is_safe(path)


@given(st.text(max_size=40))
def test_a_safe_path_never_leaves_its_folder(text: str) -> None:
    if is_safe(text):
        parts = text.split("/")
        assert ".." not in parts
        assert "" not in parts
        assert not text.startswith("/")


@given(st.text(max_size=60))
def test_any_text_is_a_reference_or_a_usage_problem(text: str) -> None:
    try:
        ref = parse_ref(text)
    except UsageProblem:
        return
    assert parse_ref(str(ref)).repo == ref.repo


@pytest.mark.parametrize("path", ["../a", "/a", "a/../b", "", ".", "a\nb", "C:/a", "a//b"])
def test_a_listed_name_that_escapes_is_unsafe(path: str) -> None:
    with pytest.raises(UnsafeFile):
        safe_path(path, HubRef("a", "b"))
