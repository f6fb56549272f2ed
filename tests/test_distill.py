"""distill: a fine-tuned pipeline becomes a LoRA with its tokens; loaded into the base it is the tuned pipeline again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import hubtool
from hubtool.actions import distill as actions
from hubtool.actions.distill import Distilled, Options
from hubtool.actions.load import load
from hubtool.actions.recipe import RunOptions
from hubtool.actions.recipe import run as run_recipe
from hubtool.cli.main import cli
from hubtool.errors import FileMissing, HubError, LossyConversion, UsageProblem, WouldOverwrite
from hubtool.formats import open_file
from hubtool.layouts.identify import identify
from hubtool.layouts.parse import parse
from hubtool.ops.extract.request import Request
from hubtool.ops.factor_space.budget import Budget
from hubtool.ops.recipe import of_metadata
from tests.support import checkpoints, tiny

if TYPE_CHECKING:
    from tests.support.hub import LocalHub  # pytest_plugins imports it first

pytest_plugins = ["tests.support.hub"]
PARTS = ("unet", "text_encoder")


def request(rank: int = 4, **fields: Any) -> Request:
    return Request(budget=fields.pop("budget", Budget(rank=rank)), **{"dtype": "fp32", **fields})


def tune(pipe: Any, rank: int | None, seed: int = 5, parts: tuple[str, ...] = PARTS) -> Any:
    """Every linear layer and convolution moves by a matrix of that rank (None: full), nothing else does."""
    generator = torch.Generator().manual_seed(seed)
    for _, _, module in tiny.modules(pipe, parts):
        rows, columns = module.weight.shape[0], module.weight[0].numel()
        inner = rank or min(rows, columns)
        change = torch.randn(rows, inner, generator=generator) @ torch.randn(inner, columns, generator=generator)
        module.weight.data += 0.1 * change.reshape(module.weight.shape) / math.sqrt(inner)
    return pipe


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.saved("sd1", tmp_path_factory.mktemp("base"))


def saver(folder: Path, change: Callable[[Any], object]) -> Path:
    pipe = tiny.build("sd1")
    change(pipe)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tune whose change has rank 4 everywhere."""
    return saver(tmp_path_factory.mktemp("tuned") / "tuned", lambda pipe: tune(pipe, 4))


def taught(pipe: Any) -> Any:
    tune(pipe, 4)
    load(pipe, tiny_adapter("<s1>", 2), name="s1")
    load(pipe, tiny_adapter("<s2>", 1, seed=8), name="s2")
    return pipe


def tiny_adapter(token: str, vectors: int, seed: int = 3, width: int = 32) -> Any:
    from hubtool.adapters.ir import Adapter

    return Adapter(None, {}, (tiny.embedding(token, width, vectors, seed=seed),))


@pytest.fixture(scope="module")
def pivotal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with two new tokens: ``<s1>`` of two vectors, ``<s2>`` of one."""
    return saver(tmp_path_factory.mktemp("pivotal") / "pivotal", taught)


def run(tuned: Path, base: Path, output: Path, asked: Request | None = None, **options: Any) -> Distilled:
    return actions.distill(tuned, base, output, asked or request(), Options(**options))


def opened(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def differences(tuned: Path, base: Path) -> dict[tuple[str, str], torch.Tensor]:
    """(component, canonical key) -> change in fp64; transformers >= 5.6 saves CLIP without ``text_model.``."""
    before, after = checkpoints.loaded(base), checkpoints.loaded(tuned)
    return {
        (part, tiny.flat_path(part, key)): after[part][key].double() - tensor.double()
        for part in PARTS
        for key, tensor in before[part].items()
        if after[part][key].shape == tensor.shape
    }


def deltas(path: Path) -> dict[tuple[str, str], torch.Tensor]:
    return {key: patch.delta().double() for key, patch in parse(open_file(path), "sd1").patches.items()}


def test_a_change_of_rank_4_is_recovered_to_a_hundred_thousandth(base: Path, tuned: Path, tmp_path: Path) -> None:
    done = run(tuned, base, tmp_path / "out.safetensors")
    found = deltas(done.output)
    moved = {key: change for key, change in differences(tuned, base).items() if change.any()}
    assert len(moved) == len(found) > 200
    for (part, key), change in moved.items():
        own = found[part, key.removesuffix(".weight")].reshape(change.shape)
        assert float((own - change).norm() / change.norm()) < 1e-5, key
    assert done.losses == ()


def test_a_change_of_full_rank_gets_the_optimum_of_an_fp64_decomposition(base: Path, tmp_path: Path) -> None:
    tuned = saver(tmp_path / "tuned", lambda pipe: tune(pipe, None))
    done = run(tuned, base, tmp_path / "out.safetensors", request(3))
    known, found = differences(tuned, base), deltas(done.output)
    lost = dict.fromkeys(PARTS, 0.0)
    total = dict.fromkeys(PARTS, 0.0)
    for (part, module), own in found.items():
        change = known[part, f"{module}.weight"]
        values = torch.linalg.svdvals(change.flatten(1))
        error = float((own.reshape(change.shape) - change).norm())
        assert error <= 1.005 * float(values[3:].norm()) + 1e-5 * float(values.norm()), module
        lost[part] += error**2
        total[part] += float(values.square().sum())
    for part, share in actions.components(done.report).items():
        if part in PARTS:
            assert share.error == pytest.approx(math.sqrt(lost[part] / total[part]), rel=1e-3)


def test_loaded_into_the_base_the_weights_are_the_tuned_ones_within_the_error(base: Path, tmp_path: Path) -> None:
    tuned = saver(tmp_path / "tuned", lambda pipe: tune(pipe, None))
    done = run(tuned, base, tmp_path / "out.safetensors", request(6, dtype="fp16"))
    pipe = opened(base)
    load(pipe, done.output)
    mine, theirs, before = tiny.effective(pipe), tiny.weights(opened(tuned)), tiny.weights(opened(base))
    for one in done.report.modules:
        part, _, module = one.name.partition(".")
        key = f"{module}.weight"
        key = key if key in mine[part] else key.removeprefix("text_model.")
        change = theirs[part][key].double() - before[part][key].double()
        error = float((mine[part][key].double() - theirs[part][key].double()).norm() / change.norm())
        assert error <= one.error * 1.01 + 1e-4, one.name


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_diffusers_makes_the_tuned_pipelines_picture_of_the_base_with_the_lora(
    base: Path, tuned: Path, tmp_path: Path, layout: str
) -> None:
    done = run(tuned, base, tmp_path / "out.safetensors", request(layout=layout))
    pipe = opened(base)
    plain = tiny.picture(pipe)
    pipe.load_lora_weights(str(tmp_path), weight_name=done.output.name)
    expected = tiny.picture(opened(tuned))
    assert float((tiny.picture(pipe) - expected).norm()) < 1e-3 * float((plain - expected).norm())


def test_new_tokens_travel_inside_and_give_the_tuned_pipelines_picture(
    base: Path, pivotal: Path, tmp_path: Path
) -> None:
    done = run(pivotal, base, tmp_path / "out.safetensors")
    known = identify(open_file(done.output))
    assert [(one.token, one.vectors.shape) for one in done.embeddings] == [("<s1>", (2, 32)), ("<s2>", (1, 32))]
    assert {"bundle_emb.<s1>.emb_params", "bundle_emb.<s2>.emb_params"} <= load_file(done.output).keys()
    assert known.kind == "lora"
    pipe = opened(base)
    load(pipe, done.output)
    prompt = "a <s1> <s2>"
    mine, theirs = tiny.picture(pipe, prompt), tiny.picture(opened(pivotal), prompt)
    assert float((mine - theirs).norm()) < 1e-3 * float((theirs - tiny.picture(opened(base), prompt)).norm())


def test_a_layout_without_a_place_for_tokens_gets_files_beside_it(base: Path, pivotal: Path, tmp_path: Path) -> None:
    done = run(pivotal, base, tmp_path / "out.safetensors", request(layout="diffusers"))
    assert [path.name for path in done.others] == ["out-s1.safetensors", "out-s2.safetensors"]
    pipe = opened(base)
    pipe.load_lora_weights(str(tmp_path), weight_name=done.output.name)
    for path in done.others:
        pipe.load_textual_inversion(str(path))
    theirs = tiny.picture(opened(pivotal), "a <s1> <s2>")
    assert float((tiny.picture(pipe, "a <s1> <s2>") - theirs).norm()) < 1e-4 * float(theirs.norm())


def test_vectors_of_new_tokens_keep_their_bits(base: Path, pivotal: Path, tmp_path: Path) -> None:
    done = run(pivotal, base, tmp_path / "out.safetensors", request(dtype="fp16"))
    held, table = load_file(done.output), load_file(next((pivotal / "text_encoder").glob("*.safetensors")))
    rows = next(value for key, value in table.items() if key.endswith("token_embedding.weight"))
    assert torch.equal(held["bundle_emb.<s1>.emb_params"], rows[514:516])
    assert torch.equal(held["bundle_emb.<s2>.emb_params"], rows[516:517])


def test_a_token_of_two_encoders_has_a_key_for_each(tmp_path: Path) -> None:
    """SDXL: LyCORIS packs ``clip_l`` and ``clip_g`` of one embedding under one name."""
    from hubtool.adapters.ir import Adapter

    pipe = tiny.build("sdxl")
    pipe.save_pretrained(tmp_path / "base")
    for part in ("text_encoder", "text_encoder_2"):
        tune(pipe, 2, parts=(part,))
    both = tuple(
        tiny.embedding("<s1>", width, encoder=name) for name, width in (("text_encoder", 16), ("text_encoder_2", 24))
    )
    load(pipe, Adapter(None, {}, both), name="s1")
    pipe.save_pretrained(tmp_path / "tuned")
    done = run(tmp_path / "tuned", tmp_path / "base", tmp_path / "out.safetensors", request(2))
    held = load_file(done.output)
    assert held["bundle_emb.<s1>.clip_l"].shape == (1, 16)
    assert held["bundle_emb.<s1>.clip_g"].shape == (1, 24)
    found = {(one.token, one.encoder) for one in parse(open_file(done.output), "sdxl").embeddings}
    assert found == {("<s1>", "text_encoder"), ("<s1>", "text_encoder_2")}


def test_a_token_in_a_row_to_spare_is_new_and_padding_is_not(tmp_path: Path) -> None:
    """Tables are often longer than the vocabulary: such a row counts where the tuned tokenizer has a word for it and it was trained."""
    pipe = tiny.build("sd1")
    pipe.text_encoder.resize_token_embeddings(520)
    pipe.save_pretrained(tmp_path / "base")
    pipe.tokenizer.add_tokens(["<s1>", "<idle>"])
    pipe.text_encoder.get_input_embeddings().weight.data[514] += 1
    tune(pipe, 2, parts=("text_encoder",)).save_pretrained(tmp_path / "tuned")
    done = run(tmp_path / "tuned", tmp_path / "base", tmp_path / "out.safetensors", request(2))
    assert [(one.token, one.vectors.shape) for one in done.embeddings] == [("<s1>", (1, 32))]
    assert done.losses == ()


def change_norms(pipe: Any) -> None:
    tune(pipe, 2)
    pipe.unet.conv_norm_out.weight.data += 0.5
    pipe.text_encoder.get_input_embeddings().weight.data[65] += 1.0


def test_what_no_lora_holds_is_refused_before_the_work_and_told_when_allowed(base: Path, tmp_path: Path) -> None:
    tuned = saver(tmp_path / "tuned", change_norms)
    with pytest.raises(LossyConversion, match=r"unet\.conv_norm_out\.weight.* changed.*1 more") as caught:
        run(tuned, base, tmp_path / "out.safetensors")
    assert "--dense" in str(caught.value.hint)
    assert not list(tmp_path.glob("out*"))
    done = run(tuned, base, tmp_path / "out.safetensors", allow_loss=True)
    told = [loss.what for loss in done.losses]
    assert told == ["unet: unet.conv_norm_out.weight changed", "text_encoder: vectors of A changed"]


def test_a_component_without_a_table_is_compared_and_told(tmp_path: Path) -> None:
    """Qwen-Image's text encoder is a language model that hubtool has no names for: a change there must not vanish silently."""
    pipe = tiny.build("qwen-image")
    pipe.save_pretrained(tmp_path / "base")
    next(iter(pipe.text_encoder.parameters())).data += 1
    pipe.save_pretrained(tmp_path / "tuned")
    with pytest.raises(LossyConversion, match=r"text_encoder: text_encoder/.* changed: qwen-image has no table"):
        run(tmp_path / "tuned", tmp_path / "base", tmp_path / "out.safetensors")


def test_full_differences_keep_norms_and_rows_of_old_tokens(base: Path, tmp_path: Path) -> None:
    tuned = saver(tmp_path / "tuned", change_norms)
    done = run(tuned, base, tmp_path / "out.safetensors", Request(kind="full", dtype="fp32"))
    assert done.losses == ()
    found = parse(open_file(done.output), "sd1").patches
    norm = dict(found["unet", "conv_norm_out"].roles())
    assert list(norm) == ["w_norm"]
    table = found["text_encoder", "text_model.embeddings.token_embedding"].delta()
    assert torch.nonzero(table.abs().sum(1)).flatten().tolist() == [65]


def test_a_single_file_without_a_tokenizer_takes_names_for_its_new_rows(
    base: Path, pivotal: Path, tmp_path: Path
) -> None:
    single = tmp_path / "tuned.safetensors"
    checkpoints.convert(pivotal, single, "single-file", family="sd1")
    done = run(single, base, tmp_path / "plain.safetensors")
    assert [one.token for one in done.embeddings] == ["<s0>", "<s1>", "<s2>"]
    assert any("--token" in note for note in done.notes)
    named = run(single, base, tmp_path / "named.safetensors", names=("<a>", "<a>_1", "<b>"))
    assert [(one.token, one.vectors.shape[0]) for one in named.embeddings] == [("<a>", 2), ("<b>", 1)]
    with pytest.raises(UsageProblem, match="3 new tokens, 1 names"):
        run(single, base, tmp_path / "no.safetensors", names=("<a>",))


def test_the_recipe_gives_the_same_bytes_again(base: Path, pivotal: Path, tmp_path: Path) -> None:
    done = run(pivotal, base, tmp_path / "out.safetensors", request(dtype="fp16"))
    kept = of_metadata(open_file(done.output).metadata)
    assert kept is not None
    assert (kept.operation, [one.role for one in kept.inputs]) == ("distill", ["base", "tuned"])
    run_recipe(done.recipe, tmp_path / "again.safetensors", RunOptions())
    assert (tmp_path / "again.safetensors").read_bytes() == done.output.read_bytes()


def test_nothing_is_left_behind_when_writing_fails(
    base: Path, pivotal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(actions, "execute", full)
    with pytest.raises(OSError, match="No space"):
        run(pivotal, base, tmp_path / "out.safetensors", tokens="beside")
    assert not list(tmp_path.iterdir())


def test_an_existing_file_of_tokens_is_not_overwritten(base: Path, pivotal: Path, tmp_path: Path) -> None:
    (tmp_path / "out-s1.safetensors").write_bytes(b"mine")
    with pytest.raises(WouldOverwrite):
        run(pivotal, base, tmp_path / "out.safetensors", tokens="beside")
    assert [path.name for path in tmp_path.iterdir()] == ["out-s1.safetensors"]


def cached(root: Path, repo: str, source: Path) -> None:
    """``source`` as huggingface_hub's cache would hold the repository."""
    home = root / f"models--{repo.replace('/', '--')}"
    commit = "a" * 40
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots").mkdir()
    (home / "snapshots" / commit).symlink_to(source)


def test_a_repository_in_the_cache_is_a_side(
    base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cached(tmp_path / "hub", "owner/base", base)
    by_name = actions.distill(tuned, "owner/base", tmp_path / "one.safetensors", request(), Options(download=False))
    by_path = run(tuned, base, tmp_path / "two.safetensors")
    assert deltas(by_name.output).keys() == deltas(by_path.output).keys()
    with pytest.raises(FileMissing, match="owner/other is neither") as caught:
        actions.distill("owner/other", base, tmp_path / "three.safetensors", request(), Options(download=False))
    assert "hubtool pull owner/other" in str(caught.value.hint)


def test_a_repository_is_pulled_once_and_then_serves_offline(
    base: Path, tuned: Path, tmp_path: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = {path.relative_to(base).as_posix(): path for path in base.rglob("*") if path.is_file()}
    hub.put("tester/base", {**files, "model.fp16.safetensors": b"another form"})
    run(tuned, Path("tester/base"), tmp_path / "one.safetensors")
    pulled = tmp_path / "cache" / "hubtool" / "bases" / "tester" / "base"
    assert sorted(path.relative_to(pulled).as_posix() for path in pulled.rglob("*") if path.is_file()) == sorted(files)
    before = len(hub.requests)
    run(tuned, Path("tester/base"), tmp_path / "two.safetensors", download=False)
    assert len(hub.requests) == before
    with pytest.raises(HubError, match="tester/other"):
        run(tuned, Path("tester/other"), tmp_path / "three.safetensors")


def test_the_command_reports_by_component_and_the_package_offers_the_same(
    base: Path, pivotal: Path, tmp_path: Path
) -> None:
    words = [pivotal, base, "--rank", "4", "-o", tmp_path / "out.safetensors", "--json"]
    result = CliRunner().invoke(cli, ["distill", *map(str, words)])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["components"]["unet"]["ranks"] == [4]
    assert told["components"]["text_encoder"]["error"] < 0.01
    assert [one["token"] for one in told["tokens"]] == ["<s1>", "<s2>"]
    done = hubtool.distill(pivotal, base, tmp_path / "py.safetensors", request(dtype="fp16"))
    assert done.output.read_bytes() == (tmp_path / "out.safetensors").read_bytes()


def test_a_dry_run_writes_nothing_and_names_the_tokens(base: Path, pivotal: Path, tmp_path: Path) -> None:
    words = [pivotal, base, "--rank", "4", "-o", tmp_path / "out.safetensors", "--dry-run"]
    result = CliRunner().invoke(cli, ["distill", *map(str, words)])
    assert result.exit_code == 0, result.output
    assert "new token <s1>, 2 vectors" in result.stdout
    assert not list(tmp_path.iterdir())


def test_lineage_goes_into_the_library(base: Path, tuned: Path, tmp_path: Path) -> None:
    library = tmp_path / "library.sqlite3"
    first, second = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    for source, path in ((base, first), (tuned, second)):
        checkpoints.convert(source, path, "single-file", family="sd1")
        save_file(load_file(path), path)
    scanned = CliRunner().invoke(cli, ["--library", str(library), "scan", str(tmp_path)])
    assert scanned.exit_code == 0, scanned.output
    run(second, first, tmp_path / "out.safetensors", library=str(library))
    shown = CliRunner().invoke(cli, ["--library", str(library), "show", str(tmp_path / "out.safetensors"), "--json"])
    assert '"distill"' in shown.stdout
