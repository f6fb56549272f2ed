"""prepare: what is refused, what is found twice, how pictures are cut, and what lies beside them afterwards."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from hubtool.cli.main import cli
from hubtool.errors import FileMissing, MissingExtra, UsageProblem, WouldOverwrite
from hubtool.training.data import buckets
from hubtool.training.data.items import collect
from hubtool.training.prepare.examine import difference_hash, sharpness
from hubtool.training.prepare.options import Options
from hubtool.training.prepare.run import prepare

SMALL = {"resolution": 64, "least": 16}


def noise(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A picture of soft blobs, unlike any other seed's."""
    values = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    noise(1).save(root / "a.png")
    noise(2, (64, 128)).save(root / "b.png")
    noise(3, (80, 80)).save(root / "more" / "a.png")
    return root


def pixel(path: Path, across: int, down: int) -> Any:
    with Image.open(path) as picture:
        return picture.getpixel((across, down))


def run(folder: Path, tmp_path: Path, **options: Any) -> Any:
    return prepare(folder, tmp_path / "out", Options(**{**SMALL, **options}))


def test_every_good_picture_is_written_with_a_caption_and_a_line(folder: Path, tmp_path: Path) -> None:
    (folder / "b.txt").write_text("a tall one")
    done = run(folder, tmp_path)
    assert [(one.name, one.source) for one in done.kept] == [
        ("a.png", "a.png"),
        ("b.png", "b.png"),
        ("a-2.png", "more/a.png"),
    ]
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert rows[1] == {"file_name": "b.png", "text": "a tall one"}
    assert (tmp_path / "out" / "b.txt").read_text() == "a tall one\n"
    assert [item.caption for item in collect(tmp_path / "out")] == ["a", "a", "a tall one"]


def test_the_source_folder_stays_as_it_was(folder: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run(folder, tmp_path)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_broken_tiny_and_blank_pictures_are_dropped_with_their_reason(folder: Path, tmp_path: Path) -> None:
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    (folder / "text.jpg").write_text("no picture")
    noise(4, (8, 8)).save(folder / "tiny.png")
    Image.new("RGB", (64, 64), "red").save(folder / "blank.png")
    noise(5, (16, 200)).save(folder / "strip.png")
    done = run(folder, tmp_path)
    assert len(done.kept) == 3
    words = {
        "broken.png": "no readable",
        "text.jpg": "no readable",
        "tiny.png": "under 16",
        "blank.png": "one colour",
        "strip.png": "narrow",
    }
    assert {name: words[name] in reason for name, reason in done.dropped.items()} == dict.fromkeys(words, True)


def test_a_mask_that_cannot_be_read_drops_its_picture_alone(folder: Path, tmp_path: Path) -> None:
    (folder / "a.mask.png").write_text("no mask")
    done = run(folder, tmp_path, masks=True)
    assert len(done.kept) == 2
    assert done.dropped["a.png"].startswith("a.mask.png: this is no readable image")
    assert len(prepare(folder, None, Options(**SMALL), dry_run=True).kept) == 3


def test_greys_of_sixteen_bits_keep_their_brightness(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "in" / "deep.png")
    run(tmp_path / "in", tmp_path)
    with Image.open(tmp_path / "out" / "deep.png") as picture:
        made = np.asarray(picture.convert("L"), dtype=np.float64)
    assert np.abs(made - values / 257.0).max() < 2.0


def test_a_token_that_is_not_named_stays_for_training_to_fill(folder: Path, tmp_path: Path) -> None:
    made = run(folder, tmp_path, captions="template", template=("a photo of {token}, {name}",))
    assert {one.caption for one in made.kept} == {"a photo of {token}, a", "a photo of {token}, b"}


def test_blurred_pictures_are_dropped_when_asked(folder: Path, tmp_path: Path) -> None:
    sharp = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    sharp.save(folder / "sharp.png")
    done = run(folder, tmp_path, blur=500.0)
    assert [one.name for one in done.kept] == ["sharp.png"]
    assert sharpness(np.asarray(sharp.convert("L"), dtype=np.float32)) > sharpness(np.zeros((64, 64), dtype=np.float32))


def test_exact_duplicates_are_the_same_pixels_in_any_file(folder: Path, tmp_path: Path) -> None:
    noise(1).save(folder / "z.bmp")
    done = run(folder, tmp_path, duplicates="exact")
    assert done.dropped == {"z.bmp": "a duplicate of a.png"}


def test_perceptual_duplicates_keep_the_largest(folder: Path, tmp_path: Path) -> None:
    noise(1, (192, 128)).save(folder / "large.jpg", quality=60)
    assert run(folder, tmp_path).dropped == {"a.png": "a duplicate of large.jpg"}
    assert prepare(folder, None, Options(**SMALL, duplicates="exact"), dry_run=True).dropped == {}


def test_the_hash_of_another_picture_is_far_away() -> None:
    near = difference_hash(noise(1)) ^ difference_hash(noise(1, (300, 200)))
    far = [difference_hash(noise(1)) ^ difference_hash(noise(seed)) for seed in range(2, 8)]
    assert near.bit_count() <= 4
    assert min(one.bit_count() for one in far) > 10


def test_buckets_keep_the_shape_and_squares_do_not(folder: Path, tmp_path: Path) -> None:
    assert dict(run(folder, tmp_path).sizes) == {"80x48": 1, "48x80": 1, "64x64": 1}
    assert set(prepare(folder, None, Options(**SMALL, buckets=False), dry_run=True).sizes) == {"64x64"}


@pytest.mark.parametrize("resolution", [64, 512, 768, 1024])
def test_every_bucket_has_at_most_the_area_and_whole_steps(resolution: int) -> None:
    step = 64 if resolution >= 256 else 16
    for width, height in buckets.sizes(resolution, step):
        assert width * height <= resolution**2
        assert width % step == height % step == 0


def test_centre_and_mask_crops_take_the_part_they_name(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    picture = np.zeros((64, 192, 3), dtype=np.uint8)
    picture[:, :64], picture[:, 64:128], picture[:, 128:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    Image.fromarray(picture).save(root / "flag.png")
    mask = Image.new("L", (192, 64), 0)
    mask.paste(255, (150, 10, 180, 50))
    mask.save(root / "flag.mask.png")
    prepare(root, tmp_path / "centre", Options(**SMALL, buckets=False))
    prepare(root, tmp_path / "mask", Options(**SMALL, buckets=False, masks=True, crop="mask"))
    assert pixel(tmp_path / "centre" / "flag.png", 32, 32) == (0, 255, 0)
    assert pixel(tmp_path / "mask" / "flag.png", 32, 32) == (0, 0, 255)
    assert collect(tmp_path / "mask")[0].size == (64, 64)
    assert collect(tmp_path / "mask")[0].mask == tmp_path / "mask" / "flag.mask.png"


def test_random_crops_are_several_and_the_seed_decides(folder: Path, tmp_path: Path) -> None:
    def files(name: str, seed: int) -> dict[str, bytes]:
        prepare(folder, tmp_path / name, Options(**SMALL, crop="random", crops=3, buckets=False, seed=seed))
        return {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.png")}

    first = files("one", 1)
    assert len(first) == 9
    assert files("same", 1) == first
    assert files("other", 2) != first


def test_an_alpha_channel_becomes_a_mask_on_white(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    cut = noise(1, (64, 64)).convert("RGBA")
    cut.putalpha(Image.new("L", (64, 64), 0))
    cut.paste((10, 200, 10, 255), (0, 0, 32, 64))
    cut.save(root / "cut.png")
    done = prepare(root, tmp_path / "out", Options(**SMALL, masks=True))
    assert done.kept[0].mask
    assert pixel(tmp_path / "out" / "cut.png", 60, 5) == (255, 255, 255)
    assert pixel(tmp_path / "out" / "cut.mask.png", 60, 5) == 0


def test_templates_and_names_make_captions(folder: Path, tmp_path: Path) -> None:
    (folder / "b.png").rename(folder / "my_black-cat 2.png")
    named = prepare(folder, None, Options(**SMALL, captions="names", prefix="sks, "), dry_run=True)
    assert "sks, my black cat" in {one.caption for one in named.kept}
    made = run(folder, tmp_path, captions="template", template=("a photo of {token}, {name}",), tokens=("<cat>",))
    assert {one.caption for one in made.kept} == {"a photo of <cat>, a", "a photo of <cat>, my black cat"}


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(1, (96, 64)).save(root / "turned.jpg", exif=exif)
    done = prepare(root, tmp_path / "out", Options(**SMALL, crop="none"))
    assert done.kept[0].size == (64, 96)
    assert collect(root)[0].size == (64, 96)


class Pictures(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, str | None]] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.found.append(dict(attrs))


def test_the_report_shows_every_picture_and_runs_nothing_from_a_name(folder: Path, tmp_path: Path) -> None:
    noise(9).save(folder / "<script>alert(1)<script>.png")
    noise(9).save(folder / "twin.png")
    done = run(folder, tmp_path)
    page = Pictures()
    page.feed((tmp_path / "out" / "report.html").read_text())
    assert len(page.found) == len(done.kept) + len(done.dropped) == 5
    assert all(one["src"].startswith("data:image/jpeg;base64,") for one in page.found)
    assert "script" not in page.tags


def test_an_output_that_exists_is_refused_and_a_failure_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path)
    with pytest.raises(WouldOverwrite):
        run(folder, tmp_path)
    (folder / "b.txt").write_bytes(b"\xff\xfe\xff")
    done = prepare(folder, tmp_path / "again", Options(**SMALL))
    assert "UTF-8" in done.dropped["b.png"]


def test_folders_that_give_nothing_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileMissing):
        prepare(tmp_path / "none", tmp_path / "out", Options())
    Image.new("RGB", (64, 64)).save(tmp_path / "blank.png")
    with pytest.raises(UsageProblem, match="none of 1 pictures"):
        prepare(tmp_path, tmp_path / "out", Options())
    assert not (tmp_path / "out").exists()


def test_a_local_captioning_model_writes_the_captions(folder: Path, tmp_path: Path) -> None:
    model = blip(tmp_path / "blip")
    done = run(folder, tmp_path, captions="model", caption_model=model)
    assert all(one.caption for one in done.kept)
    with pytest.raises(UsageProblem, match="no captioning model"):
        run(folder, tmp_path / "x", captions="model")


def blip(folder: Path) -> Path:
    """A BLIP of a few hundred parameters that says a fixed word whatever it sees."""
    import torch
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "cat", "dog"]
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BlipConfig(
        text_config={**small, "encoder_hidden_size": 8, "vocab_size": 8, "bos_token_id": 5, "pad_token_id": 0, "eos_token_id": 3, "sep_token_id": 3, "projection_dim": 8},
        vision_config={**small, "image_size": 16, "patch_size": 8, "projection_dim": 8},
    )  # fmt: skip
    model = BlipForConditionalGeneration(config)
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[6] = 100.0
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(vocab={word: at for at, word in enumerate(words)})
    BlipProcessor(BlipImageProcessor(size={"height": 16, "width": 16}), tokenizer).save_pretrained(folder)
    return folder


def test_a_local_clipseg_makes_the_masks(folder: Path, tmp_path: Path) -> None:
    model = clipseg(tmp_path / "clipseg")
    done = run(folder, tmp_path, mask_model=model, mask_text="cat", crop="mask")
    assert all(one.mask for one in done.kept)
    assert {item.mask is not None for item in collect(tmp_path / "out")} == {True}


def clipseg(folder: Path) -> Path:
    """A CLIPSeg of random weights, with the tiny CLIP tokenizer."""
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPSegProcessor, ViTImageProcessor

    from hubtool.pipelines.tiny.tokenizers import tokenizer

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPSegConfig(
        text_config={**small, "vocab_size": 514, "eos_token_id": 513}, vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=8, reduce_dim=4, decoder_num_attention_heads=2, decoder_intermediate_size=8, extract_layers=[0, 1], conditional_layer=0,
    )  # fmt: skip
    CLIPSegForImageSegmentation(config).save_pretrained(folder)
    CLIPSegProcessor(ViTImageProcessor(size={"height": 32, "width": 32}), tokenizer()).save_pretrained(folder)
    return folder


def test_missing_packages_name_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(MissingExtra) as caught:
        prepare(folder, None, Options(), dry_run=True)
    assert caught.value.hint == 'pip install "hubtool[train]"'


def test_the_command_prepares_and_reports(folder: Path, tmp_path: Path) -> None:
    asked = ["prepare", str(folder), "--resolution", "64", "--least", "16", "--json"]
    dry = CliRunner().invoke(cli, [*asked, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert json.loads(dry.stdout)["output"] is None
    done = CliRunner().invoke(cli, [*asked, "-o", str(tmp_path / "out")])
    assert json.loads(done.stdout)["dropped"] == []
    assert (tmp_path / "out" / "report.html").is_file()
