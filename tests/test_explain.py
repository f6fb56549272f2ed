"""``explain``: the seven axes with a key for each, what decides the family, claims against findings, hosts, and the next command."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hubtool.actions.explain import Explanation, explain
from hubtool.cli import explaining
from hubtool.cli.main import cli
from hubtool.formats import open_file
from hubtool.layouts import parse_file
from hubtool.layouts.axes import Axis, axes
from hubtool.layouts.family_evidence import evidence
from tests.support.adapters import attention, make, write
from tests.support.files import floats, scalar, write_safetensors

UNET = [module for module in attention("sd1") if module[0] == "unet"]
AXES = ["container", "prefix", "vocabulary", "joiner", "suffix", "algorithm", "scale"]


def hubtool(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)


def written(
    path: Path, family: str, layout: str, metadata: dict[str, str] | None = None, limit: int | None = 8
) -> Path:
    return write(make(family, attention(family, limit), alphas=(4.0,)), path, layout, metadata)


def axis(found: tuple[Axis, ...], name: str) -> Axis:
    return next(one for one in found if one.name == name)


def shown(found: tuple[Axis, ...], name: str) -> dict[str, str]:
    return {value.value: value.example for value in axis(found, name).values}


class TestAxes:
    def test_there_are_seven_each_with_a_key_for_evidence(self, tmp_path: Path) -> None:
        path = written(tmp_path / "a.safetensors", "sdxl", "kohya")
        found = explain(path).axes
        assert [one.name for one in found] == AXES
        keys = set(open_file(path).tensors)
        for name in ("prefix", "joiner", "suffix", "scale"):
            assert {value.example for value in axis(found, name).values} <= keys

    def test_of_a_kohya_file(self, tmp_path: Path) -> None:
        found = explain(written(tmp_path / "a.safetensors", "sdxl", "kohya")).axes
        assert set(shown(found, "prefix")) == {"lora_unet_", "lora_te1_", "lora_te2_"}
        assert set(shown(found, "suffix")) == {"lora_down.weight", "lora_up.weight", "alpha"}
        assert "sgm (sdxl)" in shown(found, "vocabulary")
        assert list(shown(found, "scale")) == ["an alpha tensor beside each module: scale 1"]
        assert next(iter(shown(found, "joiner"))).startswith("_")

    def test_the_vocabulary_says_what_a_name_stands_for(self, tmp_path: Path) -> None:
        found = explain(written(tmp_path / "a.safetensors", "sdxl", "kohya")).axes
        assert re.fullmatch(r"input_blocks_\w+ = unet\.down_blocks\.[\w.]+", shown(found, "vocabulary")["sgm (sdxl)"])

    @pytest.mark.parametrize(
        ("layout", "suffix", "scale"),
        [
            ("diffusers", "lora_A.weight", "lora_adapter_metadata in the header: scale 1"),
            ("diffusers-legacy", "lora.down.weight", "nothing: alpha = rank"),
            ("comfy", "lora_down.weight", "an alpha tensor"),
        ],
    )
    def test_of_other_syntaxes(self, layout: str, suffix: str, scale: str, tmp_path: Path) -> None:
        path = write(
            make("sd1", UNET[:6], alphas=(4.0 if "comfy" in layout else None,)), tmp_path / "a.safetensors", layout
        )
        found = explain(path).axes
        assert suffix in shown(found, "suffix")
        assert next(iter(shown(found, "scale"))).startswith(scale)
        assert next(iter(shown(found, "joiner"))).startswith(". ")

    def test_of_a_scale_in_the_metadata(self, tmp_path: Path) -> None:
        path = write(make("sd1", UNET[:4], alphas=(1.0,)), tmp_path / "a.safetensors", "diffusers")
        assert list(shown(explain(path).axes, "scale")) == ["lora_adapter_metadata in the header: scale 0.25"]

    def test_of_positions(self, shared: Path) -> None:
        found = explain(shared / "real" / "lora" / "cloneofsimo__lora_disney.safetensors").axes
        assert set(shown(found, "prefix")) == {"unet", "text_encoder"}
        assert next(iter(shown(found, "vocabulary"))).startswith("position")

    def test_of_attention_processors(self, shared: Path) -> None:
        found = explain(shared / "real" / "lora" / "catundchat__pytorch_lora_weights.safetensors").axes
        assert "processor.to_k_lora.down.weight" in shown(found, "suffix")
        assert "diffusers (sd1)" in shown(found, "vocabulary")

    def test_of_an_unknown_family(self, tmp_path: Path) -> None:
        tensors = {f"lora_unet_odd_block.lora_{role}.weight": floats(4, 4) for role in ("down", "up")}
        file = open_file(write_safetensors(tmp_path / "a.safetensors", tensors))
        assert list(shown(axes(file, parse_file(file)), "vocabulary")) == ["in no family's vocabulary"]

    def test_dora_names_its_axis(self, tmp_path: Path) -> None:
        stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
        tensors = {f"{stem}.lora_down.weight": floats(4, 768), f"{stem}.lora_up.weight": floats(320, 4)}
        tensors |= {f"{stem}.dora_scale": floats(1, 768)}
        found = explain(write_safetensors(tmp_path / "a.safetensors", tensors)).axes
        assert list(shown(found, "algorithm")) == ["lora + DoRA, a magnitude per input"]


class TestFamily:
    def test_others_are_ruled_out_by_the_first_thing_they_contradict(self, tmp_path: Path) -> None:
        found = explain(written(tmp_path / "a.safetensors", "sd1", "kohya", limit=None)).family
        assert found is not None
        assert re.search(r"attn2\.to_[kv] is 320 x 768 here and 320 x 1024 in sd2", found.against["sd2"])
        assert not found.telling

    def test_an_ambiguous_file_is_told_what_would_decide(self, tmp_path: Path) -> None:
        modules = [module for module in UNET if ".attn1." in module[1]][:6]
        path = write(make("sd1", modules), tmp_path / "a.safetensors", "kohya")
        found = evidence(parse_file(open_file(path)))
        assert any("in sd1" in sentence and "in sd2" in sentence for sentence in found.telling)
        steps = explain(path).next
        assert any("--family sd1|sd2" in step.command for step in steps)


class TestClaims:
    def test_stand_beside_what_the_tensors_show(self, tmp_path: Path) -> None:
        metadata = {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_dim": "8", "ss_network_alpha": "4"}
        found = explain(written(tmp_path / "a.safetensors", "sd1", "kohya", metadata, limit=None)).checks
        assert {check.what: check.agrees for check in found} == {"family": False, "rank": False, "alpha": True}

    def test_the_algorithm_of_the_arguments_is_checked(self, tmp_path: Path) -> None:
        metadata = {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "loha"}'}
        found = explain(written(tmp_path / "a.safetensors", "sd1", "kohya", metadata)).checks
        assert [(check.claimed, check.found, check.agrees) for check in found] == [("loha", "lora", False)]

    def test_a_claim_without_anything_to_hold_against_it_is_not_judged(self, tmp_path: Path) -> None:
        path = write_safetensors(tmp_path / "a.safetensors", {"w": floats(2)}, {"ss_network_dim": "8"})
        assert [check.agrees for check in explain(path).checks] == [None]


class TestNext:
    def test_a_conversion_is_named_for_the_hosts_it_helps(self, tmp_path: Path) -> None:
        path = write(make("sd1", UNET[:8], alphas=(1.0, 4.0)), tmp_path / "my file.safetensors", "kohya")
        found = explain(path)
        assert {one.host.id: one.reads for one in found.hosts}["diffusers"] == "partly"
        step = next(step for step in found.next if "diffusers" in step.why)
        assert step.command == f"hubtool convert '{path}' -o OUT --layout diffusers"

    def test_what_it_promises_is_what_the_converted_file_gets(self, tmp_path: Path) -> None:
        from hubtool.actions.convert import convert
        from hubtool.ops.target import Target

        path = write(make("sd1", UNET[:8], alphas=(1.0, 4.0)), tmp_path / "a.safetensors", "kohya")
        convert(path, tmp_path / "b.safetensors", Target(layout="diffusers"))
        after = {one.host.id: one.reads for one in explain(tmp_path / "b.safetensors").hosts}
        assert after["diffusers"] == "yes"

    def test_a_loha_is_offered_as_lora_with_its_rank(self, tmp_path: Path) -> None:
        stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
        shapes = {"hada_w1_a": (320, 2), "hada_w1_b": (2, 768), "hada_w2_a": (320, 2), "hada_w2_b": (2, 768)}
        tensors = {f"{stem}.{role}": floats(*shape) for role, shape in shapes.items()} | {f"{stem}.alpha": scalar(2.0)}
        steps = explain(write_safetensors(tmp_path / "a.safetensors", tensors)).next
        assert any(step.command.endswith("--as lora") and "ranks grow to 4 at most" in step.why for step in steps)

    def test_broken_keys_come_with_their_repair(self, tmp_path: Path) -> None:
        tensors = {
            f"lora_unet_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k_lora_{role}.weight": floats(
                *shape
            )
            for role, shape in (("down", (4, 768)), ("up", (320, 4)))
        }
        found = explain(write_safetensors(tmp_path / "a.safetensors", tensors))
        assert found.next[0].command.endswith("-o OUT --repair")
        assert not found.hosts


class TestCommand:
    def test_plain_text_has_every_section_and_no_colours(self, tmp_path: Path) -> None:
        path = written(tmp_path / "a.safetensors", "sd1", "kohya", {"ss_network_dim": "8"}, limit=None)
        text = hubtool("explain", path).stdout
        for title in (
            "conclusions",
            "evidence",
            "axes",
            "what decides the family",
            "claims against findings",
            "who reads it",
        ):
            assert f"\n{title}\n" in text
        assert "\x1b" not in text
        assert re.search(r"diffusers +0\.42\.1 +run +yes", text)

    def test_defects_carry_their_source(self, tmp_path: Path) -> None:
        path = write(make("sd1", UNET[:8], alphas=(1.0, 4.0)), tmp_path / "a.safetensors", "kohya")
        assert "the alphas differ" in hubtool("explain", path).stdout
        assert "[diffusers 0.42.1, run]" in hubtool("explain", path).stdout

    def test_json_is_the_explanation(self, tmp_path: Path) -> None:
        path = written(tmp_path / "a.safetensors", "sd1", "kohya", limit=None)
        document = json.loads(hubtool("explain", path, "--json").stdout)
        assert document == json.loads(json.dumps(explain(path).to_json()))
        assert [one["axis"] for one in document["axes"]] == AXES
        assert {one["reads"] for one in document["hosts"]} <= {"yes", "partly", "no", "not known"}

    def test_a_file_that_is_no_adapter_is_explained_too(self, tmp_path: Path) -> None:
        path = write_safetensors(tmp_path / "a.safetensors", {"w": floats(2)})
        document = json.loads(hubtool("explain", path, "--json").stdout)
        assert (document["axes"], document["hosts"], document["family_evidence"]) == ([], [], None)
        assert "nothing in the file is known" in hubtool("explain", path).stdout

    def test_a_terminal_gets_colours_and_nothing_hostile(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hostile = {"ss_output_name": "a\x1b]0;owned\x07[red]b"}
        document = explain(written(tmp_path / "a.safetensors", "sd1", "kohya", hostile)).to_json()
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        explaining.draw(document)
        text = capsys.readouterr().out
        assert "\x1b[1;36maxes" in text
        assert "\x1b]0;" not in text
        assert "[red]b" in text

    def test_real_adapters_are_explained(self, shared: Path) -> None:
        for path in sorted((shared / "real" / "lora").glob("*")) + sorted((shared / "real" / "lycoris").glob("*")):
            found = explain(path)
            assert isinstance(found, Explanation)
            assert [one.name for one in found.axes] in (AXES, [])
