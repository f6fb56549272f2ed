"""The merge command: adapters and checkpoints told apart, recipes kept and repeated, nothing left behind."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from click.testing import CliRunner  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from hubtool.actions.library import open_store, reading  # noqa: E402
from hubtool.actions.merge import Merged, Options, merge  # noqa: E402
from hubtool.actions.recipe import check  # noqa: E402
from hubtool.actions.scan import scan  # noqa: E402
from hubtool.cli.main import cli  # noqa: E402
from hubtool.errors import UsageProblem, WouldOverwrite  # noqa: E402
from hubtool.formats import open_file  # noqa: E402
from hubtool.ops import recipe as recipes  # noqa: E402
from hubtool.ops.recipe import Input  # noqa: E402
from hubtool.registry import browse  # noqa: E402
from hubtool.registry.text import raw_path  # noqa: E402
from tests.support import adapters  # noqa: E402
from tests.support.checkpoints import single  # noqa: E402


@pytest.fixture(autouse=True)
def own_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HUBTOOL_LIBRARY", str(tmp_path / "none.sqlite3"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints ``a`` and ``b`` and two adapters ``x`` and ``y``, all of SD1."""
    folder = tmp_path_factory.mktemp("models")
    start = load_file(single("sd1", folder))
    torch.manual_seed(4)
    for name in "ab":
        other = {k: (v + 0.05 * torch.randn(v.shape)).half() if v.is_floating_point() else v for k, v in start.items()}
        metadata = {"modelspec.title": f"model {name}", "modelspec.license": f"licence-{name}"}
        save_file(other, folder / f"{name}.safetensors", metadata)
    for seed, name in enumerate("xy"):
        adapter = adapters.make("sd1", ranks=(4 + 4 * seed,), dtype="F16", seed=100 * seed)
        adapters.write(adapter, folder / f"{name}.safetensors", "kohya/ldm" if seed else "kohya", {"ss_tag": name})
    return folder


def ask(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli, ["merge", *map(str, arguments)])


def answer(*arguments: str | Path) -> Any:
    found = ask(*arguments, "--json")
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def one(models: Path, output: Path, *names: str, **options: Any) -> Merged:
    inputs = [Input(path=str(models / f"{name}.safetensors")) for name in names]
    (done,) = merge(inputs, output, Options(**options))
    return done


def test_checkpoints_and_adapters_are_told_apart(models: Path, tmp_path: Path) -> None:
    a, b, x, y = (models / f"{name}.safetensors" for name in "abxy")
    checkpoint = answer(a, b, "--strength", "0.3", "-o", tmp_path / "c.safetensors")
    assert (checkpoint["kind"], checkpoint["method"]) == ("checkpoint", "weighted_sum")
    adapter = answer(f"{x}=0.8", f"{y}=0.5", "-o", tmp_path / "l.safetensors")
    assert adapter["kind"] == "adapter"
    assert adapter["relative_error"] is None or adapter["relative_error"] < 1e-3
    key = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    middle = 0.7 * load_file(a)[key].float() + 0.3 * load_file(b)[key].float()
    torch.testing.assert_close(load_file(tmp_path / "c.safetensors")[key].float(), middle, rtol=2e-3, atol=1e-5)


def test_an_adapter_beside_a_checkpoint_is_refused_and_collapse_named(models: Path, tmp_path: Path) -> None:
    found = ask(models / "a.safetensors", models / "x.safetensors", "-o", tmp_path / "o.safetensors")
    assert found.exit_code == 2
    assert "hubtool collapse" in found.stderr
    assert not (tmp_path / "o.safetensors").exists()


@pytest.fixture
def word(tmp_path: Path) -> Path:
    save_file({"<cat>": torch.ones(2, 768)}, tmp_path / "cat.safetensors")
    return tmp_path / "cat.safetensors"


def test_an_embedding_beside_loras_is_refused_and_loading_both_named(models: Path, word: Path, tmp_path: Path) -> None:
    for files in ((word, models / "x.safetensors"), (models / "x.safetensors", models / "y.safetensors", word)):
        found = ask(*files, "-o", tmp_path / "o.safetensors")
        assert found.exit_code == 2
        assert "textual_inversion" in found.stderr
        assert "merge the LoRAs alone, then hubtool generate BASE MERGED cat.safetensors" in " ".join(
            found.stderr.split()
        )
        assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("a.safetensors", "hubtool pipeline export BASE cat.safetensors -o OUT/"),
        ("cat.safetensors", "files of kind textual_inversion have no sum"),
    ],
)
def test_an_embedding_beside_another_kind_is_refused_with_what_to_do(
    models: Path, word: Path, tmp_path: Path, other: str, said: str
) -> None:
    second = word if other == word.name else models / other
    found = ask(second, word, "-o", tmp_path / "o.safetensors")
    assert found.exit_code == 2
    assert said in " ".join(found.stderr.split())
    assert not (tmp_path / "o.safetensors").exists()


def test_a_file_of_unknown_kind_is_refused_and_explain_named(models: Path, tmp_path: Path) -> None:
    save_file({"something": torch.ones(4, 4)}, tmp_path / "what.safetensors")
    found = ask(models / "x.safetensors", tmp_path / "what.safetensors", "-o", tmp_path / "o.safetensors")
    assert found.exit_code == 2
    assert "hubtool explain what.safetensors" in " ".join(found.stderr.split())


def test_the_output_keeps_the_recipe_with_the_hashes_of_its_inputs(models: Path, tmp_path: Path) -> None:
    one(models, tmp_path / "o.safetensors", "a", "b", strengths=("0.3",))
    said = open_file(tmp_path / "o.safetensors").metadata
    kept = recipes.of_metadata(said)
    assert kept is not None
    assert [i.sha256 for i in kept.inputs] == [
        hashlib.sha256((models / f"{name}.safetensors").read_bytes()).hexdigest() for name in "ab"
    ]
    assert said["modelspec.license"] == "licence-a, licence-b"
    assert str(models) not in json.dumps(dict(said))


@pytest.mark.parametrize("names", ["ab", "xy"])
def test_equal_merges_give_equal_bytes(models: Path, tmp_path: Path, names: str) -> None:
    for workers, name in ((1, "1"), (3, "2")):
        one(models, tmp_path / f"{name}.safetensors", *names, strengths=("0.4",), workers=workers)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("names", "options"),
    [
        ("ab", {"method": "slerp", "strengths": ("0,unet=0.5",), "dtype": "bf16"}),
        ("ab", {"method": "dare_ties", "parameters": {"density": 0.4}, "seed": 9}),
        ("xy", {"method": "ties", "strengths": ("0.5", "0.7")}),
    ],
)
def test_a_kept_recipe_gives_the_same_bytes_again(models: Path, tmp_path: Path, names: str, options: Any) -> None:
    base = {"base": str(models / "a.safetensors")} if options["method"] == "dare_ties" else {}
    for name in names:
        os.link(models / f"{name}.safetensors", tmp_path / f"{name}.safetensors")
    one(tmp_path, tmp_path / "o.safetensors", *names, **options, **base)
    assert check(tmp_path / "o.safetensors").same
    again = ask("--recipe", tmp_path / "o.safetensors", "-o", tmp_path / "again.safetensors")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "o.safetensors").read_bytes()


def test_a_recipe_may_be_written_by_hand(models: Path, tmp_path: Path) -> None:
    text = f"""
version: 1
operation: merge
method: weighted_sum
inputs:
  - path: {models / "a.safetensors"}
  - path: {models / "b.safetensors"}
    strength: 0.3
"""
    (tmp_path / "r.yaml").write_text(text)
    found = ask("--recipe", tmp_path / "r.yaml", "-o", tmp_path / "o.safetensors")
    assert found.exit_code == 0, found.output
    one(models, tmp_path / "p.safetensors", "a", "b", strengths=("0.3",))
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in "op")
    assert all(torch.equal(first[key], second[key]) for key in second)


@pytest.mark.parametrize("names", ["ab", "xy"])
def test_steps_lead_from_the_first_input_to_the_second(models: Path, tmp_path: Path, names: str) -> None:
    first, second = (models / f"{name}.safetensors" for name in names)
    document = answer(first, second, "--steps", "3", "-o", tmp_path / "between")
    assert [Path(row["output"]).name for row in document["merged"]] == [f"step-{i}-of-2.safetensors" for i in range(3)]
    if names == "ab":
        key = "model.diffusion_model.middle_block.0.in_layers.2.weight"
        rows = [load_file(tmp_path / "between" / f"step-{i}-of-2.safetensors")[key] for i in range(3)]
        assert torch.equal(rows[0], load_file(first)[key])
        assert torch.equal(rows[2], load_file(second)[key])


def test_a_folder_merges_into_a_single_file_where_the_output_is_one(models: Path, tmp_path: Path) -> None:
    from tests.support.checkpoints import convert

    convert(models / "a.safetensors", tmp_path / "a", "diffusers")
    found = answer(tmp_path / "a", models / "b.safetensors", "-o", tmp_path / "o.safetensors")
    assert found["layout"] == "ldm"
    document = answer(tmp_path / "a", models / "b.safetensors", "-o", tmp_path / "o")
    assert document["format"] == "diffusers-folder"
    assert json.loads((tmp_path / "o" / "hubtool.recipe.json").read_text())["operation"] == "merge"


def test_a_dry_run_tells_everything_and_writes_nothing(models: Path, tmp_path: Path) -> None:
    document = answer(models / "a.safetensors", models / "b.safetensors", "--dry-run")
    assert document["output"] is None
    assert document["matched"] > 100
    assert os.listdir(tmp_path) == []


def test_outputs_are_never_inputs_and_never_overwritten_without_force(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match="output is an input"):
        one(models, models / "b.safetensors", "a", "b", force=True)
    (tmp_path / "o.safetensors").write_bytes(b"mine")
    with pytest.raises(WouldOverwrite):
        one(models, tmp_path / "o.safetensors", "a", "b")
    assert (tmp_path / "o.safetensors").read_bytes() == b"mine"
    one(models, tmp_path / "o.safetensors", "a", "b", force=True)
    assert open_file(tmp_path / "o.safetensors").tensors


def test_lineage_goes_into_the_library_of_an_input(models: Path, tmp_path: Path) -> None:
    library = str(tmp_path / "library.sqlite3")
    with open_store(library) as store:
        scan(store, [str(models / "x.safetensors")])
    done = one(models, tmp_path / "o.safetensors", "x", "y", library=library)
    assert done.warning is None
    with reading(library) as reader:
        place = browse.at_path(reader, raw_path(str(tmp_path / "o.safetensors")))
        assert place is not None
        assert place.artifact_id is not None
        assert len(browse.lineage(reader, place.artifact_id)["parents"]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--strength", "1", "--strength", "1", "--strength", "1"), "3 strengths for 2 inputs"),
        (("--method", "blend"), "no merge method"),
        (("--set", "density"), "sets nothing"),
        (("--method", "ties"), "needs a base"),
        (("--rank", "4"), "ranks are of adapters"),
        (("--strength", "unett=1"), "no module answers"),
        (("--component", "unet"), "chosen by strengths"),
        (("--steps", "3", "--strength", "unet=1"), "between whole inputs"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(models: Path, tmp_path: Path, arguments: Any, said: str) -> None:
    found = ask(models / "a.safetensors", models / "b.safetensors", "-o", tmp_path / "o", *arguments)
    assert found.exit_code == 2, found.output
    assert said in found.stderr
    assert not (tmp_path / "o").exists() or os.listdir(tmp_path / "o") == []


def test_one_input_is_no_merge(models: Path, tmp_path: Path) -> None:
    assert ask(models / "a.safetensors", "-o", tmp_path / "o.safetensors").exit_code == 2


def test_the_methods_are_listed_with_their_parameters_and_sources() -> None:
    rows = {row["method"]: row for row in answer("--methods")["methods"]}
    assert {
        "weighted_sum",
        "slerp",
        "ties",
        "dare",
        "della",
        "breadcrumbs",
        "model_stock",
        "geometric_median",
    } <= rows.keys()
    assert rows["ties"]["parameters"]["density"]["default"] == 0.5
    assert all(row["help"] and row["source"] for row in rows.values())
    assert "--set density=0.5" in ask("--methods").stdout


def test_people_are_told_what_happened(models: Path, tmp_path: Path) -> None:
    found = ask(
        models / "a.safetensors", models / "b.safetensors", "--strength", "0,vae=1", "-o", tmp_path / "o.safetensors"
    )
    assert found.exit_code == 0
    assert "unet: 0 tensors merged" in found.stdout
    assert "layout ldm" in found.stdout
