"""``inspect`` and ``explain``: the JSON contract, the checks of values, what people see."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner, Result

import hubtool as api
from hubtool import resources
from hubtool.actions.inspect import inspect
from hubtool.actions.refs import locate
from hubtool.actions.scan import scan
from hubtool.cli.facts import facts
from hubtool.cli.main import cli
from hubtool.errors import CorruptFile, FileMissing, NotFound
from tests.support.files import RawTensor, floats, write_safetensors

SCHEMA = json.loads((resources.schemas() / "inspect.schema.json").read_text("utf-8"))
MODULE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def hubtool(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, list(map(str, args)), prog_name="hubtool")


def half(*values: float) -> RawTensor:
    return "F16", (len(values),), struct.pack(f"<{len(values)}e", *values)


def lora(path: Path, metadata: dict[str, str] | None = None, **changed: RawTensor) -> Path:
    """A kohya LoRA of one module; ``changed`` replaces its tensors by role."""
    roles = {
        "lora_down.weight": floats(4, 320, step=2**-9),
        "lora_up.weight": floats(320, 4, step=2**-9),
        "alpha": floats(start=2),
    }
    tensors = {f"{MODULE}.{role}": tensor for role, tensor in {**roles, **changed}.items()}
    return write_safetensors(path, tensors, metadata)


def poisoned(number: float) -> RawTensor:
    values = [0.5] * 1280
    values[700] = number
    return "F16", (4, 320), struct.pack("<1280e", *values)


class TestDocument:
    def test_has_every_field_of_the_schema(self, tmp_path: Path) -> None:
        document = inspect(lora(tmp_path / "a.safetensors")).to_json()
        jsonschema.validate(document, SCHEMA)
        assert set(document) == set(SCHEMA["properties"])

    def test_says_what_a_lora_is(self, tmp_path: Path) -> None:
        path = lora(tmp_path / "a.safetensors", {"ss_network_dim": "4"})
        document = inspect(path).to_json()
        expected = {
            "path": str(path),
            "size": path.stat().st_size,
            "format": "safetensors",
            "kind": "lora",
            "algorithm": "lora",
            "components": {"unet": 1},
            "tensors": 3,
            "parameters": 4 * 320 * 2 + 1,
            "dtypes": ["F32"],
            "ranks": [4],
            "alphas": [2.0],
            "metadata": {"ss_network_dim": "4"},
        }
        assert {name: document[name] for name in expected} == expected

    def test_hashes_are_those_of_the_bytes(self, tmp_path: Path) -> None:
        path = lora(tmp_path / "a.safetensors")
        hashes = inspect(path).to_json()["hashes"]
        data = path.read_bytes()
        body = data[8 + int.from_bytes(data[:8], "little") :]
        assert hashes["sha256"] == hashlib.sha256(data).hexdigest()
        assert hashes["payload_sha256"] == hashlib.sha256(body).hexdigest()
        assert len(hashes["content_id"]) == 64

    def test_metadata_changes_the_file_but_not_its_content(self, tmp_path: Path) -> None:
        one = inspect(lora(tmp_path / "a.safetensors")).hashes
        two = inspect(lora(tmp_path / "b.safetensors", {"note": "x"})).hashes
        assert one["sha256"] != two["sha256"]
        assert (one["payload_sha256"], one["content_id"]) == (two["payload_sha256"], two["content_id"])

    def test_without_hashes_they_are_null(self, tmp_path: Path) -> None:
        document = inspect(lora(tmp_path / "a.safetensors"), hashes=False).to_json()
        jsonschema.validate(document, SCHEMA)
        assert set(document["hashes"].values()) == {None}

    def test_an_unknown_file_is_healthy(self, tmp_path: Path) -> None:
        document = inspect(write_safetensors(tmp_path / "a.safetensors", {"w": floats(2)})).to_json()
        jsonschema.validate(document, SCHEMA)
        assert document["kind"] == "unknown"

    def test_real_files_fit_the_schema(self, shared: Path) -> None:
        seen = set()
        for path in sorted((shared / "real").rglob("*")):
            if path.suffix not in {".safetensors", ".pt", ".pth", ".bin", ".png"} or path.parent.name == "container":
                continue
            document = inspect(path, hashes=False).to_json()
            jsonschema.validate(document, SCHEMA)
            seen.add(document["kind"])
        assert {"lora", "textual_inversion", "aesthetic_embedding", "vae"} <= seen

    def test_a_peft_folder_is_one_artifact(self, shared: Path) -> None:
        document = inspect(shared / "real" / "peft" / "anirudh-ak__gpt2_lora").to_json()
        jsonschema.validate(document, SCHEMA)
        assert (document["kind"], document["ranks"]) == ("lora", [8])

    def test_is_the_public_function(self) -> None:
        assert api.inspect is inspect


class TestValues:
    @pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
    def test_a_number_that_is_not_finite_is_corrupt(self, tmp_path: Path, number: float) -> None:
        path = lora(tmp_path / "a.safetensors", **{"lora_down.weight": poisoned(number)})
        with pytest.raises(CorruptFile) as raised:
            inspect(path)
        assert "lora_down" in raised.value.message
        assert raised.value.path == str(path)

    def test_near_overflow_of_half_precision_is_a_warning(self, tmp_path: Path) -> None:
        path = lora(tmp_path / "a.safetensors", **{"lora_down.weight": poisoned(65000.0)})
        found = {finding.code: finding for finding in inspect(path).findings}
        assert found["near-overflow"].severity == "warning"

    def test_values_of_unknown_files_are_not_judged(self, tmp_path: Path) -> None:
        path = write_safetensors(tmp_path / "a.safetensors", {"mask": half(float("-inf"), 0)})
        assert inspect(path).identity.kind == "unknown"

    def test_headers_alone_can_be_asked_for(self, tmp_path: Path) -> None:
        path = lora(tmp_path / "a.safetensors", **{"lora_down.weight": poisoned(float("nan"))})
        assert inspect(path, hashes=False, values=False).identity.kind == "lora"


class TestCommand:
    def test_prints_facts_for_people(self, tmp_path: Path) -> None:
        result = hubtool("inspect", lora(tmp_path / "a.safetensors"))
        assert result.exit_code == 0
        lines = [line.split() for line in result.stdout.splitlines()]
        assert ["ranks", "4"] in lines
        assert ["alphas", "2"] in lines
        assert any(line[:2] == ["hashes", "sha256"] for line in lines)

    def test_json_is_the_report(self, tmp_path: Path) -> None:
        path = lora(tmp_path / "a.safetensors")
        assert json.loads(hubtool("inspect", path, "--json").stdout) == inspect(path).to_json()

    def test_lists_tensors_on_request(self, tmp_path: Path) -> None:
        path = lora(tmp_path / "a.safetensors")
        assert f"{MODULE}.lora_up.weight" in hubtool("inspect", path, "--tensors", "--no-hash").stdout
        listed = json.loads(hubtool("inspect", path, "--tensors", "--json").stdout)["tensor_list"]
        assert listed[0] == {"name": f"{MODULE}.lora_down.weight", "dtype": "F32", "shape": [4, 320]}

    def test_a_corrupt_file_ends_with_7_and_a_json_error(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        path.write_bytes(b"\xff" * 40)
        result = hubtool("inspect", path, "--json")
        assert result.exit_code == 7
        assert set(json.loads(result.stdout)["error"]) >= {"code", "message", "path", "offset"}

    def test_several_files_are_a_list_and_failures_make_it_partial(self, tmp_path: Path) -> None:
        good, bad = lora(tmp_path / "a.safetensors"), tmp_path / "missing.safetensors"
        result = hubtool("inspect", good, bad, "--json")
        documents = json.loads(result.stdout)
        assert result.exit_code == 3
        assert [documents[0]["kind"], documents[1]["error"]["code"]] == ["lora", "missing"]

    def test_hostile_metadata_cannot_steer_the_terminal(self, tmp_path: Path) -> None:
        hostile = "a\x1b]0;owned\x07\u202e"
        path = lora(tmp_path / "a.safetensors", {"ss_output_name": hostile, "modelspec.trigger_phrase": hostile})
        for command in (["inspect"], ["inspect", "--json"], ["explain"], ["explain", "--json"]):
            result = hubtool(*command, path)
            assert result.exit_code == 0
            assert not set("\x1b\x07\u202e") & set(result.output)


class TestExplain:
    def test_shows_conclusions_evidence_claims_and_findings(self, tmp_path: Path) -> None:
        path = lora(tmp_path / "a.safetensors", {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_dim": "8"})
        result = hubtool("explain", path)
        assert result.exit_code == 0
        for part in ("conclusions", "evidence", "claims of the metadata", "findings", "[claim-contradicts]"):
            assert part in result.stdout

    def test_json_has_the_axes_and_no_hashes(self, tmp_path: Path) -> None:
        document = json.loads(hubtool("explain", lora(tmp_path / "a.safetensors"), "--json").stdout)
        assert {"kind", "family_candidates", "layout", "evidence", "claims", "findings"} <= set(document)
        assert "hashes" not in document

    def test_takes_a_reference_of_the_library(self, tmp_path: Path) -> None:
        path = lora(tmp_path / "a.safetensors")
        assert hubtool("scan", path).exit_code == 0
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        document = json.loads(hubtool("explain", sha256[:12], "--json").stdout)
        assert document["path"] == str(path)

    def test_a_reference_to_nothing_is_not_found(self) -> None:
        result = hubtool("explain", "abcdef123456")
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")


class TestLocate:
    def test_an_existing_path_is_itself(self, tmp_path: Path) -> None:
        assert locate(str(tmp_path)) == tmp_path

    def test_an_artifact_that_is_gone_is_not_found(self, tmp_path: Path) -> None:
        from hubtool.actions.library import open_store

        path = lora(tmp_path / "a.safetensors")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        with open_store() as store:
            scan(store, [str(tmp_path)])
            path.unlink()
            scan(store, [str(tmp_path)])
        with pytest.raises(NotFound):
            locate(sha256[:12])

    def test_a_missing_file_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileMissing):
            inspect(tmp_path / "none.safetensors")


NOTHING: dict[str, Any] = {
    **dict.fromkeys(("algorithm", "family", "base_model", "layout", "variant")),
    **{name: [] for name in ("family_candidates", "kind_candidates", "ranks", "alphas", "dtypes", "flags")},
    **{name: [] for name in ("trigger_words", "embeddings", "findings")},
    **{name: {} for name in ("components", "metadata", "hashes")},
    **dict.fromkeys(("tensors", "parameters"), 0),
    **{"path": "a.pt", "size": 10, "format": "png", "kind": "unknown"},  # noqa: PIE800 - beside its like
}


class TestFacts:
    def lines(self, **fields: Any) -> list[str]:
        return [" ".join(line.split()) for line in facts({**NOTHING, **fields}).splitlines()]

    def test_leave_out_what_is_not_known(self) -> None:
        assert self.lines() == ["a.pt", "kind unknown", "tensors 0 (0 parameters, no dtype)", "file 10 B, png"]

    def test_name_the_families_that_fit(self) -> None:
        assert "family not certain, fits sd1, sdxl" in self.lines(family_candidates=["sd1", "sdxl"])

    def test_name_the_kinds_that_fit(self) -> None:
        assert "kind unknown, perhaps vae" in self.lines(kind_candidates=["vae"])

    def test_cut_long_lists(self) -> None:
        assert "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more" in self.lines(ranks=list(range(20)))

    def test_put_the_worst_finding_first(self) -> None:
        found = [{"code": code, "severity": code, "message": "m"} for code in ("info", "error", "warning")]
        assert self.lines(findings=found)[-3:] == ["error m [error]", "warning m [warning]", "info m [info]"]
