"""Recipes: one text for one recipe, checked by the schema, stamped into outputs, and repeated to the byte."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from hubtool.actions import recipe as actions
from hubtool.actions.recipe import Hashes, RunOptions, fingerprint
from hubtool.cli.main import cli
from hubtool.errors import ConversionError, CorruptFile, HubtoolError, NotFound, UnsafeFile, UsageProblem
from hubtool.formats import open_file
from hubtool.ops import recipe as recipes
from hubtool.ops.folder_plan import FolderPlan
from hubtool.ops.plan import Plan
from hubtool.ops.recipe import Input, Output, Parent, Recipe
from hubtool.ops.recipes.schema import problems, schema
from hubtool.tensors.expr import Literal
from tests.support.files import floats, write_safetensors

FULL = Recipe(
    "merge",
    (
        Input(path="a.safetensors", strength=1, role="base"),
        Input(ref="3f2a91", strengths=("unet=0.5", "unet:down_blocks.*=0.3"), blocks="1,0,1"),
        Input(
            recipe=Recipe(
                "collapse", (Input(sha256="a" * 64, role="base"), Input(name="style.safetensors", strength=0.25))
            )
        ),
    ),
    method="ties",
    parameters={"density": 0.2, "deep": {"list": [1, None, True, "x"]}},
    output=Output(layout="kohya", format="safetensors", dtype="fp16"),
    seed=7,
)
YAML = """
# a comment, which JSON has no place for
version: 1
operation: collapse
inputs:
  - path: base.safetensors
    role: base
  - {path: style.safetensors, strength: 0.5}
"""


# --- texts -------------------------------------------------------------------------------------------------------------


def test_a_recipe_is_one_text_whatever_the_order_it_was_written_in() -> None:
    text = recipes.dump(FULL)
    assert recipes.load(text) == recipes.load(recipes.dump(recipes.load(text), indent=4))
    shuffled = json.dumps(dict(reversed(json.loads(text).items())), indent=1)
    assert recipes.dump(recipes.load(shuffled)) == text
    assert json.loads(text)["inputs"][0]["strength"] == 1.0


def test_json_and_yaml_say_the_same() -> None:
    pytest.importorskip("yaml")
    wanted = Recipe(
        "collapse", (Input(path="base.safetensors", role="base"), Input(path="style.safetensors", strength=0.5))
    )
    assert recipes.load(YAML) == recipes.load(recipes.dump(wanted)) == wanted


WRONG = {
    "another version": ({"version": 2}, "version"),
    "no operation": ({"operation": None}, "operation"),
    "an unknown word": ({"colour": "red"}, "colour"),
    "no inputs": ({"inputs": []}, "inputs"),
    "an input that names nothing": ({"inputs": [{"strength": 1}]}, "inputs[0]"),
    "a strength in words": ({"inputs": [{"path": "a", "strength": "much"}]}, "inputs[0].strength"),
    "a strength beyond any sense": ({"inputs": [{"path": "a", "strength": 1e9}]}, "inputs[0].strength"),
    "a hash that is none": ({"inputs": [{"sha256": "12"}]}, "inputs[0].sha256"),
    "a nested mistake": ({"inputs": [{"recipe": {"version": 1, "operation": "merge", "inputs": [{}]}}]}, "inputs[0].recipe.inputs[0]"),
    "a seed below zero": ({"seed": -1}, "seed"),
    "an unknown format": ({"output": {"format": "zip"}}, "output.format"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_the_schema_does_not_allow_is_refused_by_its_place(case: str) -> None:
    change, where = WRONG[case]
    document = {"version": 1, "operation": "merge", "inputs": [{"path": "a"}], **change}
    with pytest.raises(CorruptFile) as caught:
        recipes.from_json(document)
    assert where in caught.value.message
    assert not jsonschema.Draft202012Validator(schema("recipe")).is_valid(document)


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(schema("recipe"))
    jsonschema.validate(FULL.to_json(), schema("recipe"))


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.floats(-2000, 2000),
    st.sampled_from(["", "a", "merge", "a" * 64, "safetensors"]),
)
_VALUES = st.recursive(_SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(
    ["path", "recipe", "strength", "inputs", "version", "operation", "x"]), inner, max_size=3)), max_leaves=5)  # fmt: skip


@given(st.data())
def test_our_check_and_jsonschema_agree(data: st.DataObject) -> None:
    document = copy.deepcopy(FULL.to_json())
    for _ in range(data.draw(st.integers(1, 3))):
        target: Any = data.draw(
            st.sampled_from([document, *document["inputs"], document["output"], document["parameters"]])
        )
        words = st.sampled_from(
            [
                "version",
                "operation",
                "inputs",
                "path",
                "sha256",
                "recipe",
                "strength",
                "strengths",
                "seed",
                "format",
                "x",
            ]
        )
        target[data.draw(words)] = data.draw(_VALUES)
        if not isinstance(document.get("inputs"), list) or not all(isinstance(one, dict) for one in document["inputs"]):
            break
    ours = next(problems(document, schema("recipe")), None)
    assert (ours is None) == jsonschema.Draft202012Validator(schema("recipe")).is_valid(document), ours


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("version: 1\noperation: merge\ninputs: &a [{path: x}]\nparameters: {y: *a}\n", UnsafeFile),
        ("version: 1\nversion: 1\noperation: merge\ninputs: [{path: x}]\n", CorruptFile),
        ('{"version": 1, "version": 1}', CorruptFile),
        ("[" * 5000, HubtoolError),
        ('{"a":' * 5000, UnsafeFile),
        ("a: [", CorruptFile),
        ("!!python/object/apply:os.system [id]", CorruptFile),
        ("{", CorruptFile),
        ("", CorruptFile),
        ("#" * (5 << 20), UnsafeFile),
    ],
)
def test_texts_that_abuse_a_parser_are_refused(text: str, error: type[HubtoolError]) -> None:
    pytest.importorskip("yaml")
    with pytest.raises(error):
        recipes.load(text)


# --- stamps ------------------------------------------------------------------------------------------------------------


def plan(**options: Any) -> Plan:
    return Plan(
        Path("in"), options.pop("format", "safetensors"), None, {"w": Literal(bytes(4), "F32", (1,))}, **options
    )


PARENTS = [
    Parent(
        "a.safetensors",
        "a" * 64,
        {"modelspec.license": "mit", "ss_steps": "5", "modelspec.hash_sha256": "0x1"},
        ("cat",),
    ),
    Parent(
        "b.safetensors",
        "b" * 64,
        {"modelspec.license": "None", "modelspec.title": "Bee", "hubtool.origin": "{}"},
        ("dog", "cat"),
    ),
]
ASKED = Recipe("merge", (Input(path="/secret/folder/a.safetensors"), Input(ref="b", strength=0.5)))


def test_a_stamp_names_inputs_by_name_and_hash_and_no_path() -> None:
    made = recipes.stamp(plan(metadata={"format": "pt", "modelspec.architecture": "x"}), ASKED, PARENTS)
    kept = recipes.of_metadata(made.metadata)
    assert kept is not None
    assert [(one.path, one.ref, one.name, one.sha256) for one in kept.inputs] == [
        (None, None, "a.safetensors", "a" * 64), (None, None, "b.safetensors", "b" * 64),
    ]  # fmt: skip
    assert "secret" not in json.dumps(dict(made.metadata))


def test_a_stamp_merges_licences_triggers_and_titles_and_keeps_the_rest_apart() -> None:
    said = recipes.stamp(
        plan(metadata={"format": "pt", "ss_network_dim": "8", "sshs_model_hash": "1"}), ASKED, PARENTS
    ).metadata
    assert {key: said[key] for key in said if not key.startswith("hubtool.")} == {
        "format": "pt", "ss_network_dim": "8", "modelspec.license": "mit", "modelspec.trigger_phrase": "cat, dog",
        "modelspec.merged_from": "a.safetensors, Bee",
    }  # fmt: skip
    first, second = json.loads(said[recipes.PARENTS])
    assert first == {
        "name": "a.safetensors",
        "sha256": "a" * 64,
        "metadata": {"modelspec.license": "mit", "ss_steps": "5"},
    }
    assert "hubtool.origin" not in second["metadata"]


def test_parents_of_parents_stay_nested() -> None:
    made = recipes.stamp(plan(), ASKED, PARENTS)
    again = recipes.stamp(plan(), ASKED, [Parent("c.safetensors", None, made.metadata), PARENTS[0]])
    first = json.loads(again.metadata[recipes.PARENTS])[0]
    assert [one["name"] for one in first["parents"]] == ["a.safetensors", "b.safetensors"]
    assert first["recipe"]["operation"] == "merge"


def test_a_folder_keeps_its_recipe_as_a_document_and_a_torch_file_says_that_it_cannot() -> None:
    folder = FolderPlan(Path("in"), "diffusers-folder", None, {}, documents={"model_index.json": b"{}"})
    made = recipes.stamp(folder, ASKED, PARENTS)
    assert set(made.documents) == {"model_index.json", recipes.DOCUMENT, f"{recipes.PARENTS}.json"}
    assert recipes.load(made.documents[recipes.DOCUMENT].decode()).operation == "merge"
    assert "no place" in recipes.stamp(plan(format="torch-zip"), ASKED, PARENTS).notes[0]


def test_metadata_that_is_no_recipe_is_no_recipe() -> None:
    assert recipes.of_metadata({}) is None
    assert recipes.of_metadata({recipes.KEY: "{nonsense"}) is None


# --- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD1 checkpoint and two adapters for it."""
    pytest.importorskip("diffusers")
    from tests.support import adapters, tiny
    from tests.support.checkpoints import pipeline, single

    folder = tmp_path_factory.mktemp("stock")
    single("sd1", folder)
    for seed, name in enumerate(("style", "detail")):
        made = tiny.make(pipeline("sd1"), ("unet",), only="attn", family="sd1", seed=seed + 1)
        adapters.write(made.adapter, folder / f"{name}.safetensors", "diffusers")
    return folder


def asked(*extra: Input, **first: Any) -> Recipe:
    base = Input(**{"path": "sd1.safetensors", **first}, role="base", family="sd1")
    return Recipe("collapse", (base, *(extra or (Input(path="style.safetensors", strength=0.5, role="adapter"),))))


def run(recipe: Recipe, out: Path, folder: Path | None = None, **options: Any) -> str:
    return actions.run(recipe, out, RunOptions(folder=folder, **options)).sha256 or ""


def test_paths_start_in_the_recipes_own_folder(tmp_path: Path, stock: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("sd1", "style"):
        os.link(stock / f"{name}.safetensors", tmp_path / "sub" / f"{name}.safetensors")
    (tmp_path / "sub/recipe.json").write_text(recipes.dump(asked()))
    done = CliRunner().invoke(
        cli, ["recipe", "run", str(tmp_path / "sub/recipe.json"), "-o", str(tmp_path / "out.safetensors"), "--json"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["sha256"] == fingerprint(tmp_path / "out.safetensors")


def test_inputs_by_path_ref_hash_and_name_give_the_same_bytes(tmp_path: Path, stock: Path) -> None:
    assert CliRunner().invoke(cli, ["scan", str(stock)]).exit_code == 0
    base, style = (fingerprint(stock / f"{name}.safetensors") for name in ("sd1", "style"))
    forms = [
        asked(),
        asked(Input(ref=style[:12], strength=0.5, role="adapter")),
        asked(Input(sha256=style, strength=0.5, role="adapter"), path=None, sha256=base),
        asked(Input(name="style.safetensors", strength=0.5, role="adapter")),
    ]
    found = {run(one, tmp_path / f"{at}.safetensors", stock) for at, one in enumerate(forms)}
    assert len(found) == 1


def test_a_nested_recipe_is_run_first_and_kept_in_the_stamp(tmp_path: Path, stock: Path) -> None:
    inner = asked()
    outer = Recipe(
        "collapse", (Input(recipe=inner, role="base", family="sd1"), Input(path="detail.safetensors", role="adapter"))
    )
    run(outer, tmp_path / "nested.safetensors", stock)
    run(inner, tmp_path / "step.safetensors", stock)
    second = asked(
        Input(path=str(stock / "detail.safetensors"), role="adapter"), path=str(tmp_path / "step.safetensors")
    )
    run(second, tmp_path / "stepwise.safetensors")
    from safetensors.torch import load_file

    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("nested", "stepwise"))
    assert all(one[key].equal(other[key]) for key in one)
    kept, _ = actions.read(tmp_path / "nested.safetensors")
    assert kept.inputs[0].recipe is not None
    assert [step.name for step in kept.inputs[0].recipe.inputs] == ["sd1.safetensors", "style.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "nested.safetensors",
        "step.safetensors",
        "stepwise.safetensors",
    ]
    verdict = actions.check(tmp_path / "nested.safetensors", RunOptions(search=(stock,)))
    assert verdict.same


def test_operations_nest_in_one_another(tmp_path: Path, stock: Path) -> None:
    both = Recipe(
        "merge", tuple(Input(path=f"{name}.safetensors", strength=0.5) for name in ("style", "detail")), method="concat"
    )
    run(asked(Input(recipe=both, role="adapter")), tmp_path / "out.safetensors", stock)
    kept, _ = actions.read(tmp_path / "out.safetensors")
    assert kept.inputs[1].recipe is not None
    assert [one.name for one in kept.inputs[1].recipe.inputs] == ["style.safetensors", "detail.safetensors"]
    assert actions.check(tmp_path / "out.safetensors", RunOptions(search=(stock,))).same


def test_other_bytes_than_the_recipe_means_are_refused(tmp_path: Path, stock: Path) -> None:
    recipe = asked(Input(path="style.safetensors", sha256="0" * 64, role="adapter"))
    with pytest.raises(ConversionError, match="other bytes"):
        run(recipe, tmp_path / "out.safetensors", stock)
    with pytest.raises(NotFound, match="000000000000"):
        run(asked(Input(sha256="0" * 64, role="adapter")), tmp_path / "out.safetensors", stock)
    assert not list(tmp_path.iterdir())


def test_recipes_nested_without_end_are_refused(tmp_path: Path) -> None:
    recipe = asked()
    for _ in range(9):
        recipe = Recipe("collapse", (Input(recipe=recipe),))
    with pytest.raises(UsageProblem, match="deep"):
        run(recipe, tmp_path / "out.safetensors")


def test_an_operation_that_no_recipe_can_ask_for_is_a_mistake(tmp_path: Path, stock: Path) -> None:
    recipe = Recipe("convert", (Input(path="style.safetensors"),))
    with pytest.raises(UsageProblem, match="convert"):
        run(recipe, tmp_path / "out.safetensors", stock)


def test_check_repeats_an_output_to_the_byte_and_notices_a_change(tmp_path: Path, stock: Path) -> None:
    out = tmp_path / "out.safetensors"
    sha256 = run(asked(), out, stock)
    assert actions.check(out, RunOptions(search=(stock,))).same
    (tmp_path / "recipe.json").write_text(
        recipes.dump(Recipe("collapse", asked().inputs, output=Output(sha256=sha256)))
    )
    assert actions.check(tmp_path / "recipe.json", RunOptions(folder=stock)).same
    data = bytearray(out.read_bytes())
    data[-1] ^= 1
    out.write_bytes(data)
    done = CliRunner().invoke(cli, ["recipe", "check", str(out), "--search", str(stock), "--json"])
    assert (done.exit_code, json.loads(done.stdout)["same"]) == (1, False)


def test_a_folder_is_repeated_too(tmp_path: Path, stock: Path) -> None:
    run(asked(path="sd1"), tmp_path / "out", stock)
    assert actions.check(tmp_path / "out", RunOptions(search=(stock,))).same


def test_show_prints_what_run_takes(tmp_path: Path, stock: Path) -> None:
    out = tmp_path / "out.safetensors"
    sha256 = run(asked(), out, stock)
    shown = CliRunner().invoke(cli, ["recipe", "show", str(out)])
    (tmp_path / "shown.json").write_text(shown.stdout)
    recipe, _ = actions.read(tmp_path / "shown.json")
    assert run(recipe, tmp_path / "again.safetensors", stock) == sha256
    with pytest.raises(NotFound, match="keeps no recipe"):
        actions.read(stock / "style.safetensors")


def test_large_inputs_are_hashed_only_when_asked_and_repeat_either_way(
    tmp_path: Path, stock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hubtool.actions import collapse, late_hashes

    monkeypatch.setattr(late_hashes, "LARGE", 1 << 20)
    style = Input(path=str(stock / "style.safetensors"), role="adapter")
    for name, hashes in (("plain", False), ("hashed", True)):
        out = tmp_path / f"{name}.safetensors"
        collapse.collapse(stock / "sd1.safetensors", [style], out, collapse.Options(family="sd1", hashes=hashes))
        base, adapter = actions.read(out)[0].inputs
        assert (base.sha256 is not None, adapter.sha256 is not None) == (hashes, True)
        assert actions.check(out, RunOptions(search=(stock,))).same


@pytest.mark.slow
def test_the_same_recipe_gives_the_same_bytes_under_any_hash_seed_and_thread_count(tmp_path: Path, stock: Path) -> None:
    (stock / "recipe.json").write_text(
        recipes.dump(
            asked(Input(path="style.safetensors", strength=0.5), Input(path="detail.safetensors", strength=-0.3))
        )
    )
    found = set()
    for seed, workers, threads in (("0", "1", "1"), ("1", "2", "1"), ("4242", "5", "3")):
        out = tmp_path / f"{seed}.safetensors"
        command = [
            sys.executable,
            "-m",
            "hubtool",
            "recipe",
            "run",
            str(stock / "recipe.json"),
            "-o",
            str(out),
            "--workers",
            workers,
        ]
        environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads}
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.add(fingerprint(out))
    assert len(found) == 1


# --- fingerprints ------------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_the_sha256_of_a_file_and_that_of_a_list_for_a_folder(tmp_path: Path) -> None:
    import hashlib

    folder = tmp_path / "unet"
    file = write_safetensors(folder / "diffusion_pytorch_model.safetensors", {"w": floats(2, 2)})
    (folder / "config.json").write_text("{}")
    own = hashlib.sha256(file.read_bytes()).hexdigest()
    assert open_file(folder).format == "component-folder"
    assert Hashes([file, folder]).of(file) == fingerprint(file) == own
    assert fingerprint(folder) == hashlib.sha256(f"{own}  diffusion_pytorch_model.safetensors\n".encode()).hexdigest()
