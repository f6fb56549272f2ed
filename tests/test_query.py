"""The query language: what it means, what it refuses, and that SQL and Python agree on every query."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubtool.errors import UsageProblem
from hubtool.registry import browse, fields, hashing
from hubtool.registry.conditions import Value
from hubtool.registry.fast import FastReader
from hubtool.registry.query import parse
from hubtool.registry.records import FileStat, HashResult
from hubtool.registry.store import Store
from hubtool.registry.values import moment, size
from tests.support.library import add, add_root, artifact_of, new_file, tag

NOW = 1_750_000_000.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store.open(tmp_path_factory.mktemp("query") / "library.sqlite3") as opened:
        root = add_root(opened, "/Modelle/Größe".encode())
        facts = (
            {
                "name": b"anime/Style_100%.safetensors",
                "kind": "lora",
                "family": "sdxl",
                "algorithm": "lokr",
                "rank": 8,
                "alpha": 4.0,
                "size": 200_000_000,
            },
            {
                "name": b"anime/two words.safetensors",
                "kind": "lora",
                "family": "sd1",
                "algorithm": "lora",
                "rank": 32,
                "alpha": 0.5,
                "title": "Two Words!",
            },
            {
                "name": b"vae/kl-f8.pt",
                "kind": "vae",
                "family": None,
                "format": "torch-zip",
                "dtypes": ("F16", "BF16"),
                "base_model": "Juggernaut XL",
            },
            {
                "name": "straße/Ärger.safetensors".encode(),
                "kind": "unknown",
                "health": "suspect",
                "search_text": "Masterpiece\nGIRL",
            },
            {"name": b"ti/face.pt", "kind": "textual_inversion", "trigger_words": ("<My-Face>", "zwx"), "size": 5000},
            {
                "name": b"\xff\xfe.safetensors",
                "kind": None,
                "health": "corrupt",
                "size": 0,
                "embedded_hashes": {"payload_sha256": "abcdef012345"},
            },
        )
        add(
            opened,
            *(
                new_file(root, at["name"], n, **{k: v for k, v in at.items() if k != "name"})
                for n, at in enumerate(facts, 1)
            ),
        )
        tag(opened, artifact_of(opened, b"vae/kl-f8.pt"), ["Best", "todo"], title="My VAE", notes="sharp, not soft")
        tag(opened, artifact_of(opened, b"ti/face.pt"), ["todo"])
        last = browse.places(opened)[-1]
        assert hashing.record(
            opened, [HashResult(last.id, FileStat(0, 5, 6, 1), {"sha256": "ab" * 32, "autov2": "ab" * 5})]
        ) == [True]
        yield opened


def names(store: Store, text: str) -> list[str]:
    return [
        row.places[0].raw.decode("utf-8", "replace").rpartition("/")[2]
        for row in browse.select(store, parse(text, now=NOW))
    ]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("kind:lora", ["Style_100%.safetensors", "two words.safetensors"]),
        ("kind:lora family:sdxl algorithm:lokr", ["Style_100%.safetensors"]),
        ("KIND:LORA -family:sdxl", ["two words.safetensors"]),
        ("kind:lora ^family:sdxl", ["two words.safetensors"]),
        ("kind:vae,textual_inversion", ["kl-f8.pt", "face.pt"]),
        ("kind:vae | kind:textual_inversion", ["kl-f8.pt", "face.pt"]),
        ("(kind:vae OR kind:lora) NOT family:sdxl", ["two words.safetensors", "kl-f8.pt"]),
        ("rank:8..32", ["Style_100%.safetensors", "two words.safetensors"]),
        ("rank:>8", ["two words.safetensors"]),
        ("rank:..8", ["Style_100%.safetensors"]),
        ("alpha:0.5", ["two words.safetensors"]),
        ("size:>100M", ["Style_100%.safetensors"]),
        ("size:..4KiB -kind:vae", ["two words.safetensors", "Ärger.safetensors", "��.safetensors"]),
        ("path:~anime", ["Style_100%.safetensors", "two words.safetensors"]),
        ("path:/modelle/GRÖSSE/vae", ["kl-f8.pt"]),
        ('"two words"', ["two words.safetensors"]),
        ("words two", ["two words.safetensors"]),
        ("100%", ["Style_100%.safetensors"]),
        ("name:style_", ["Style_100%.safetensors"]),
        ("STRASSE", ["Ärger.safetensors"]),
        ("masterpiece girl", ["Ärger.safetensors"]),
        ("trigger:zwx", ["face.pt"]),
        ("my-face", ["face.pt"]),
        ("sharp", ["kl-f8.pt"]),
        ("tag:best", ["kl-f8.pt"]),
        ("tag:todo -tag:best", ["face.pt"]),
        ("has:tag", ["kl-f8.pt", "face.pt"]),
        ("no:tag kind:lora", ["Style_100%.safetensors", "two words.safetensors"]),
        ("is:corrupt", ["��.safetensors"]),
        ("health:suspect,corrupt", ["Ärger.safetensors", "��.safetensors"]),
        ("dtype:f16", ["kl-f8.pt"]),
        ("dtype:6", []),
        ("base:juggernaut", ["kl-f8.pt"]),
        ("title:=two words!", []),
        ('title:="two words!"', ["two words.safetensors"]),
        ("hash:ABCDEF", ["��.safetensors"]),
        ("hash:ababab", ["��.safetensors"]),
        ("is:hashed", ["��.safetensors"]),
        ("added:..2001", []),
        ("added:2001.. kind:vae", ["kl-f8.pt"]),
        ("is:missing", []),
        ("kind:lora sort:-size limit:1", ["Style_100%.safetensors"]),
        ("sort:name limit:2", ["face.pt", "kl-f8.pt"]),
        ("sort:rank,-size limit:3", ["Style_100%.safetensors", "two words.safetensors", "face.pt"]),
        ("limit:0", []),
    ],
)
def test_a_query_selects(store: Store, query: str, expected: list[str]) -> None:
    assert names(store, query) == expected


def test_an_empty_query_selects_everything(store: Store) -> None:
    assert len(names(store, "")) == 6


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("famly:sdxl", "did you mean 'family'"),
        ("is:corupt", "did you mean 'corrupt'"),
        ("has:trigers", "did you mean 'trigger'"),
        ("sort:sise", "did you mean 'size'"),
        ("kind:", "needs a value"),
        ("size:big", "not a size"),
        ("rank:many", "not a number"),
        ("added:yesterday", "not a time"),
        ("added:2025-13", "not a time"),
        ("rank:~3", "works on text"),
        ("limit:many", "whole number"),
        ("(a", "without a ')'"),
        ("a)", "without a '('"),
        ("a |", "nothing on one side"),
        ("()", "empty"),
        ('"open', "cannot be read"),
        ("-(", "empty '()'"),
        ("NOT  ", "a term should stand"),
        ("(" * 60 + "a" + ")" * 60, "nested"),
        ("a " * 300, "more than 200"),
    ],
)
def test_a_query_that_makes_no_sense_says_why(query: str, message: str) -> None:
    with pytest.raises(UsageProblem) as caught:
        parse(query)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1", 1), ("100M", 100_000_000), ("1.5GB", 1_500_000_000), ("900MiB", 900 << 20), ("2k", 2000), ("1Ti", 1 << 40)],
)
def test_sizes_are_powers_of_1000_and_of_1024_with_an_i(text: str, expected: int) -> None:
    assert size(text) == (expected, expected)


def test_a_date_names_a_whole_span() -> None:
    assert moment("2024-02", NOW) == (1_706_745_600, 1_709_251_199)
    assert moment("2024-02-29", NOW) == (1_709_164_800, 1_709_251_199)
    assert moment("-2w", NOW) == (NOW - 14 * 86400,) * 2


def test_every_reader_selects_the_same(store: Store) -> None:
    assert store.path
    with FastReader(store.path) as fast:
        for text in ("", "kind:lora", "todo | anime", "-has:tag sort:-size"):
            assert browse.select(fast, parse(text)) == browse.select(store, parse(text))
        assert browse.subjects(fast) == browse.subjects(store)


WORDS = st.sampled_from(
    ["anime", "two", "%", "_", "!", "'", "ß", "SS", "Ä", "zwx", "my", "f8", "\U0001f600", "todo", "girl\n"]
)
VOCABULARY = st.sampled_from(
    ["lora", "VAE", "unknown", "sdxl", "sd1", "corrupt", "todo", "best", "present", "f16", "bf16,f32", "lokr"]
)
NUMBERS = st.sampled_from(["8", "0.5", "8..32", "..9", "9..", ">8", ">=8", "<32", "<=0.5", "=32", "100", "0"])


def atoms() -> st.SearchStrategy[str]:
    by_type = {
        name: [field.name for field in fields.FIELDS.values() if field.type == name]
        for name in ("word", "text", "digest", "set")
    }
    numeric = [field.name for field in fields.FIELDS.values() if field.type in {"number", "size"}]
    return st.one_of(
        WORDS.map(lambda word: f'"{word}"'),
        st.tuples(st.sampled_from(by_type["word"] + by_type["set"]), VOCABULARY).map(":".join),
        st.tuples(st.sampled_from(by_type["text"] + by_type["word"]), WORDS).map(
            lambda pair: f'{pair[0]}:~"{pair[1]}"'
        ),
        st.tuples(st.sampled_from(by_type["text"]), WORDS).map(lambda pair: f'{pair[0]}:="{pair[1]}"'),
        st.tuples(st.sampled_from(by_type["digest"]), st.sampled_from(["ab", "abc", "0x", "f", "zz"])).map(":".join),
        st.tuples(st.sampled_from(numeric), NUMBERS).map(":".join),
        st.sampled_from(sorted(fields.FLAGS)).map("is:{}".format),
        st.sampled_from(sorted(fields.HAS)).map("has:{}".format),
        st.sampled_from(["added:2001..", "added:..-1d", "added:2024", "tag:todo"]),
    )


QUERIES = st.recursive(
    atoms(),
    lambda inner: st.one_of(
        inner.map("-({})".format),
        st.tuples(inner, inner).map("({0[0]} | {0[1]})".format),
        st.tuples(inner, inner).map(" ".join),
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def subjects(store: Store) -> dict[int, dict[str, list[Value]]]:
    return browse.subjects(store)


@settings(max_examples=200, deadline=None)
@given(text=QUERIES)
def test_sql_and_python_judge_alike(store: Store, subjects: dict[int, dict[str, list[Value]]], text: str) -> None:
    query = parse(f"({text}) | is:present {text}", now=NOW)  # a word on states: nothing is hidden
    selected = {row.key for row in browse.select(store, query)}
    assert selected == {key for key, subject in subjects.items() if query.match(subject)}


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_a_query_or_a_usage_problem(text: str) -> None:
    try:
        query = parse(text)
    except UsageProblem:
        return
    clause, parameters = query.clause()
    assert clause.count(":p") >= len(parameters)


def test_the_fields_command_lists_what_the_parser_knows() -> None:
    from hubtool.actions.catalogue import list_fields

    listed = {row["field"] for row in list_fields()}
    assert listed == {*fields.FIELDS, "is", "has", "no", "sort", "limit"}
