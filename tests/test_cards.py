"""Model cards: what the Hub refuses is found offline, what a person wrote stays, and nothing private or hostile gets in."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from hubtool.actions.card import write_card
from hubtool.actions.publish_facts import Said
from hubtool.cli.main import cli as main
from hubtool.errors import CorruptFile, UnsupportedFile, UsageProblem
from hubtool.hub import card_text, cards, pictures, validation
from hubtool.hub.cards import Card, Record
from hubtool.hub.facts import Facts, Listed, Picture
from hubtool.hub.layout import place, safe_name
from hubtool.hub.licences import Licence, licence_ids, licence_of, tags_of, task_of
from hubtool.hub.privacy import Cleaning
from hubtool.layouts.tables import family_ids
from tests.support.publishing import lora

HOME = "/home"  # of no machine in particular
FACTS = Facts(
    "me/style", "Style", "adapter", "lora", "pytorch_lora_weights.safetensors", family="sdxl", algorithm="lora",
    base_models=("stabilityai/stable-diffusion-xl-base-1.0",), licence=Licence("openrail++"), words=("sks dog", "oil: painting"),
    strength=0.8, task="text-to-image", tags=("stable-diffusion-xl",),
    files=(Listed("pytorch_lora_weights.safetensors", 10, "ab" * 32, "canonical"),), pictures=(Picture("images/0.png", 'a "sks" dog: #1'),),
)  # fmt: skip


def errors(front: dict[str, Any]) -> list[str]:
    return [finding.message for finding in validation.check_front(front) if finding.severity == "error"]


# what the Hub refuses


@pytest.mark.parametrize(
    ("front", "word"),
    [
        ({"license": "my-own"}, "license"),
        ({"license": ["mit", "nope"]}, "license"),
        ({"base_model": f"{HOME}/me/model"}, "base_model"),
        ({"base_model": "https://huggingface.co/a/b"}, "base_model"),
        ({"base_model": ["a/b", "./local"]}, "base_model"),
        ({"base_model": "v1-5.safetensors"}, "base_model"),
        ({"base_model_relation": "lora"}, "base_model_relation"),
        ({"tags": ["lora", 1.5]}, "tags"),
        ({"tags": [True]}, "tags"),
        ({"language": [False]}, "language"),
        ({"new_version": "three/part/name"}, "new_version"),
        ({"instance_prompt": ["a"]}, "instance_prompt"),
        ({"widget": ["x"]}, "widget"),
    ],
)
def test_what_the_hub_refuses_is_an_error_that_names_the_field(front: dict[str, Any], word: str) -> None:
    assert any(word in message for message in errors(front))


def test_the_same_cards_are_refused_by_the_server_and_by_us(shared: Path) -> None:
    """The server that stands in for the Hub is the oracle."""
    from tests.support.hub_server import Handler

    fronts: list[dict[str, Any]] = [
        {"license": "mit"}, {"license": "nope"}, {"license": ["mit", "x"]}, {"base_model": "a/b"}, {"base_model": "a b"}, {"base_model": ["a/b", "/c"]},
        {"base_model_relation": "merge"}, {"base_model_relation": "child"}, {"tags": ["a"]}, {"tags": [1]}, {"language": "en"}, {"datasets": [None]},
    ]  # fmt: skip
    for front in fronts:
        refused, _ = Handler.check_card(object(), f"---\n{yaml.safe_dump(front)}---\n")
        assert bool(refused) == bool(errors(front)), front


def test_a_card_of_hubtool_passes_and_is_complete() -> None:
    front = card_text.front(FACTS)
    assert validation.check_front(front) == []
    assert front["base_model_relation"] == "adapter"
    assert front["instance_prompt"] == "sks dog, oil: painting"
    assert front["widget"] == [{"text": 'a "sks" dog: #1', "output": {"url": "images/0.png"}}]
    assert {"lora", "diffusers", "template:sd-lora", "text-to-image", "stable-diffusion-xl"} <= set(front["tags"])


def test_an_incomplete_card_is_warned_about_not_refused() -> None:
    found = validation.check_front({})
    assert {finding.severity for finding in found} == {"warning"}
    assert (
        "license_link"
        in validation.check_front({"license": "other", "license_name": "mine", "base_model": "a/b"})[0].message
    )


def test_files_that_a_card_names_must_be_there() -> None:
    front = {"widget": [{"text": "a", "output": {"url": "images/0.png"}}], "license_link": "LICENSE.md"}
    assert len(validation.check_files(front, {"README.md"})) == 2
    assert validation.check_files(front, {"images/0.png", "LICENSE.md"}) == []
    assert validation.check_files({"license_link": "https://a/b"}, ()) == []


@pytest.mark.parametrize("name", ["style", "a/b/c", "a/-b", "a/b..c", "a/b.git", "me/x@branch", "a b/c"])
def test_impossible_repositories_are_refused_before_anything_is_read(name: str) -> None:
    with pytest.raises(UsageProblem):
        validation.check_repo(name)


@pytest.mark.parametrize("path", ["../a", "/a", "a/.git/b", "a//b", ".", "a\\b"])
def test_impossible_paths_are_refused(path: str) -> None:
    assert validation.check_path(path, 1, lfs=True) is not None


def test_every_family_has_a_task_or_none_and_known_licences() -> None:
    for family in family_ids():
        licence = licence_of((), family)
        assert licence is None or licence.id in licence_ids()
        assert task_of(family) in (
            None,
            "text-to-image",
            "image-to-image",
            "text-to-video",
            "image-to-video",
            "text-to-audio",
        )
        assert all(isinstance(tag, str) for tag in tags_of(family))
    assert licence_of(["black-forest-labs/FLUX.1-schnell"], "flux1") == Licence("apache-2.0")
    dev = licence_of(["black-forest-labs/FLUX.1-dev"], "flux1")
    assert dev is not None
    assert dev.name == "flux-1-dev-non-commercial-license"


# snippets


@pytest.mark.parametrize("task", ["text-to-image", "text-to-video"])
@pytest.mark.parametrize(
    "loads", ["lora", "textual-inversion", "textual-inversion-two", "pipeline", "single-file", "peft"]
)
def test_every_snippet_is_python_whatever_the_words_are(loads: str, task: str) -> None:
    nasty = ('"""\n```\n<!-- hubtool:end use -->', "a'b\\", "{x}")
    facts = replace(
        FACTS,
        task=task,
        loads=loads,
        words=nasty,
        pictures=(),
        main="a b.safetensors",
        files=(Listed("a b.safetensors", 1, "0"),),
    )
    card = card_text.card(facts)
    assert validation.check_body(card.body, {"a b.safetensors"}) == []
    assert "use" in card.blocks
    assert cards.parse(str(card)).blocks.keys() == card.blocks.keys()


def test_a_snippet_that_names_a_missing_file_is_told() -> None:
    body = '```py\nload("gone.safetensors")\n```\n```py\nthis is no python\n```\n'
    found = validation.check_body(body, {"here.safetensors"})
    assert ["gone" in found[0].message, "no Python" in found[1].message] == [True, True]


@given(st.lists(st.text(min_size=1), min_size=1, max_size=4), st.text(), st.text())
def test_no_text_breaks_out_of_the_card(words: list[str], title: str, prompt: str) -> None:
    facts = replace(FACTS, words=tuple(words), title=title, pictures=(Picture("images/0.png", prompt),))
    card = card_text.card(facts)
    text = str(card)
    again = cards.parse(text)
    assert dict(again.front) == dict(card.front)
    assert again.blocks == card.blocks
    assert "<script" not in text.split("```", maxsplit=1)[0].replace("&lt;script", "")


# a person's own text


def published() -> tuple[Card, Record]:
    card = card_text.card(FACTS)
    return card, cards.record(card)


def test_publishing_again_changes_nothing() -> None:
    card, base = published()
    text = str(card)
    merged = cards.merge(cards.parse(text), card, base)
    assert (str(merged.card), merged.kept) == (text, ())


def test_what_a_person_wrote_around_and_inside_survives_an_update() -> None:
    card, base = published()
    text = (
        str(card)
        .replace("# Style\n", "# My own title\n\nHello, *world*.\n")
        .replace("license: openrail++", "license: mit  # as agreed")
    )
    text = text.replace("tags:\n- lora\n", "# found by\ntags:\n- cute\n- lora\n").replace("- text-to-image\n", "")
    text = text.replace("Recommended strength: **0.8**", "Use 0.6!")
    text = text.replace("library_name: diffusers\n", "library_name: diffusers\nlanguage: [en, de]  # both\n")
    ours = card_text.card(replace(FACTS, words=("new word",), strength=0.9))
    merged = cards.merge(cards.parse(text), ours, base)
    after = str(merged.card)
    assert "# My own title\n\nHello, *world*.\n" in after
    assert "license: mit  # as agreed" in after
    assert "language: [en, de]  # both" in after
    assert "# found by" in after
    assert "Use 0.6!" in after
    assert "instance_prompt: new word" in after
    assert "<code>new word</code>" in after
    assert "sks dog</code>" not in after
    assert merged.card.front["tags"][0] == "cute"
    assert "text-to-image" not in merged.card.front["tags"]
    assert set(merged.kept) == {"license", "block strength"}


def test_what_is_asked_for_now_wins_over_a_person() -> None:
    card, base = published()
    theirs = cards.parse(str(card).replace("license: openrail++", "license: mit"))
    merged = cards.merge(theirs, card, base, {"license"})
    assert merged.card.front["license"] == "openrail++"


def test_a_card_that_hubtool_never_saw_gets_its_blocks_appended() -> None:
    card, _ = published()
    theirs = cards.parse("---\nlicense: mit\ntags: [mine]\n---\n# Mine\n\ntext\n")
    merged = cards.merge(theirs, card, None)
    text = str(merged.card)
    assert text.startswith("---\nlicense: mit\n")
    assert "# Mine\n\ntext\n" in text
    assert merged.card.blocks.keys() == card.blocks.keys()
    assert merged.card.front["tags"][0] == "mine"
    assert merged.card.front["base_model"] == FACTS.base_models[0]


def test_a_block_that_a_person_took_out_stays_out() -> None:
    card, base = published()
    text = str(card)
    start, end = text.index("<!-- hubtool:begin licence"), text.index("<!-- hubtool:end licence -->")
    merged = cards.merge(cards.parse(text[:start] + text[end + 28 :]), card, base)
    assert "licence" not in merged.card.blocks


@pytest.mark.parametrize(
    "text",
    ["---\na: [\n---\n", "---\n- a\n---\n", "---\na: 1\na: 2\n---\n", "---\n!!python/object:os.system {}\n---\n"],
)
def test_a_front_matter_that_is_no_plain_mapping_is_refused(text: str) -> None:
    with pytest.raises(CorruptFile):
        cards.parse(text)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,8}", fullmatch=True),
        st.one_of(st.text(), st.integers(), st.lists(st.text(), max_size=3)),
        max_size=5,
    )
)
def test_editing_a_front_matter_says_what_was_meant(front: dict[str, Any]) -> None:
    source = "# top\nfirst: 1 # one\n\nlist:\n- a\n# inside\n- b\nlast: x\n"
    wanted = {"first": 1, "list": ["a", "b"], **front}
    text = cards.edit(source, wanted)
    assert cards.load_yaml(text) == wanted
    if front.get("first", 1) == 1:
        assert "first: 1 # one" in text


# privacy


def test_paths_and_user_names_shrink_and_secrets_are_named_without_being_quoted() -> None:
    cleaning = Cleaning()
    token = "hf_" + "A1b2" * 6
    cleaned = cleaning.metadata(
        {
            "ss_sd_model_name": "C:\\Users\\Alice Smith\\models\\v1-5.safetensors",
            "ss_dataset_dirs": '{"10_x": {}}',
            "ot_config": json.dumps(
                {"workspace_dir": f"{HOME}/alice/w", "n": 1, "cache": ["D:/c/d", "a/b"], "url": "https://a.b/c/d"}
            ),
            "ss_training_comment": "alice trained it at /mnt/data/alice/x and ~/y/z on 1/2",
            "modelspec.author": "alice",
            "ss_tag_frequency": '{"10_alice": {"alice": 3}}',
            "note": f"key {token}",
            "lora_adapter_metadata": '{"unet.r": 4}',
        },
        "x",
    )
    assert cleaned["ss_sd_model_name"] == "v1-5.safetensors"
    assert "ss_dataset_dirs" not in cleaned
    assert json.loads(cleaned["ot_config"]) == {
        "workspace_dir": "w",
        "n": 1,
        "cache": ["d", "a/b"],
        "url": "https://a.b/c/d",
    }
    assert cleaned["ss_training_comment"] == "user trained it at x and z on 1/2"
    assert cleaned["modelspec.author"] == "alice"
    assert cleaned["ss_tag_frequency"] == '{"10_user": {"user": 3}}'
    assert cleaned["lora_adapter_metadata"] == '{"unet.r": 4}'
    secrets = [finding for finding in cleaning.findings() if finding.severity == "error"]
    assert len(secrets) == 1
    assert token not in secrets[0].message


@pytest.mark.parametrize(
    "text",
    ["hf_" + "a" * 34, "Bearer abcdefghijkl", "api_key=abcd1234efgh5678", "sk-" + "B" * 20, "ghp_" + "x" * 30, "AKIA" + "A" * 16,
     "-----BEGIN RSA PRIVATE KEY-----", "https://me:pass@host/x"],
)  # fmt: skip
def test_secrets_of_many_kinds_are_found(text: str) -> None:
    cleaning = Cleaning()
    cleaning.metadata({"comment": f"see {text} there"}, "x")
    assert cleaning.secrets


@pytest.mark.parametrize(
    "text",
    [
        "hf_transfer and hf_xet",
        "token: <cat-toy>",
        "class_tokens: sks dog",
        "a/b/c",
        "https://huggingface.co/a/b",
        "1girl, solo",
    ],
)
def test_innocent_text_is_left_alone(text: str) -> None:
    cleaning = Cleaning()
    assert cleaning.metadata({"note": text}, "x") == {"note": text}
    assert not cleaning.secrets


# pictures


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png(*more: bytes) -> bytes:
    head = chunk(b"IHDR", b"\0\0\0\1\0\0\0\1\x08\0\0\0\0")
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


def test_a_picture_gives_its_prompt_and_keeps_nothing_but_pixels() -> None:
    text = b"parameters\0a sks dog\nNegative prompt: bad\nSteps: 20, Model: /mnt/me/x"
    shown = pictures.read(png(chunk(b"tEXt", text), chunk(b"tEXt", b"workflow\0{}"), chunk(b"eXIf", b"x")), "a.png")
    assert (shown.prompt, shown.negative, shown.removed) == ("a sks dog", "bad", True)
    assert shown.data == png()
    assert not pictures.read(png(), "a.png").removed


def test_jpeg_and_webp_lose_exif_and_can_still_be_decoded(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x010E] = f"{HOME}/me/secret"
    for name in ("a.jpg", "a.webp"):
        Image.new("RGB", (8, 8), (200, 10, 10)).save(tmp_path / name, exif=exif)
        shown = pictures.read((tmp_path / name).read_bytes(), name)
        assert shown.removed
        assert b"secret" not in shown.data
        (tmp_path / f"out{shown.suffix}").write_bytes(shown.data)
        with Image.open(tmp_path / f"out{shown.suffix}") as image:
            image.load()
            assert image.size == (8, 8)
            assert not image.getexif()


@pytest.mark.parametrize(
    "data", [b"GIF89a", b"", b"<svg onload=x>", b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffIHDR", b"\xff\xd8\xff\xe1\xff\xff"]
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises((CorruptFile, UnsupportedFile)):
        pictures.read(data, "x.png")


# where files go


def test_files_have_their_places() -> None:
    assert (
        place("style-000010.safetensors", main_stem="style", layout="kohya/sgm", same_content=False)
        == "epochs/style-000010.safetensors"
    )
    assert (
        place("style.safetensors", main_stem="style-000010", layout=None, same_content=False)
        == "epochs/style.safetensors"
    )
    assert place("x.safetensors", main_stem="style", layout="kohya/sgm", same_content=True) == "kohya/x.safetensors"
    assert place("x.safetensors", main_stem="style", layout="kohya/sgm", same_content=False) == "variants/x.safetensors"
    assert "checkpoint" not in safe_name("my_checkpoint.safetensors")
    assert safe_name("../a\nb?.safetensors") == "_a_b_.safetensors"


# the command


def test_a_card_is_written_updated_and_checked_alone(tmp_path: Path) -> None:
    lora(tmp_path, metadata={"modelspec.trigger_phrase": "sks dog"})
    run = CliRunner()
    out = tmp_path / "README.md"
    made = run.invoke(
        main, ["card", str(tmp_path / "style.safetensors"), "-o", str(out), "--repo", "me/style", "--strength", "0.8"]
    )
    assert made.exit_code == 0, made.output
    first = out.read_text()
    assert 'load_lora_weights("me/style"' in first
    assert "base_model: stable-diffusion-v1-5/stable-diffusion-v1-5" in first
    assert "license: creativeml-openrail-m" in first
    out.write_text(first + "\nMine.\n")
    again = run.invoke(
        main,
        [
            "card",
            str(tmp_path / "style.safetensors"),
            "-o",
            str(out),
            "--repo",
            "me/style",
            "--strength",
            "0.8",
            "--json",
        ],
    )
    assert json.loads(again.stdout)["changed"] is False
    assert out.read_text().endswith("Mine.\n")
    assert run.invoke(main, ["card", str(out)]).exit_code == 0
    out.write_text(first.replace("creativeml-openrail-m", "my-licence"))
    refused = run.invoke(main, ["card", str(out), "--json"])
    assert refused.exit_code == 1
    assert json.loads(refused.stdout)["ok"] is False


def test_a_dry_run_of_a_card_writes_nothing(tmp_path: Path) -> None:
    lora(tmp_path)
    out = tmp_path / "README.md"
    done = CliRunner().invoke(main, ["card", str(tmp_path / "style.safetensors"), "-o", str(out), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "+license: creativeml-openrail-m" in done.stdout
    assert not out.exists()


def test_the_card_tells_the_recipe_and_the_training(tmp_path: Path) -> None:
    recipe = {"operation": "merge", "inputs": [{"name": "a.safetensors", "sha256": "00" * 32}], "note": "```"}
    path = lora(
        tmp_path,
        metadata={
            "hubtool.recipe": json.dumps(recipe),
            "ss_steps": "1200",
            "ss_sd_model_name": f"{HOME}/bob/x.safetensors",
        },
    )
    written = write_card(str(path), repo="me/style", said=Said(title="My <b>"))
    assert "| Training steps | <code>1200</code> |" in written.text
    assert '"operation": "merge"' in written.text
    assert "bob" not in written.text
    assert "# My &lt;b&gt;" in written.text
    assert "- merge" in written.text
