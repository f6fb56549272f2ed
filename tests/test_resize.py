"""resize: other ranks for an adapter, against full SVDs; the command, its recipe and its bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from click.testing import CliRunner, Result  # noqa: E402

from hubtool.actions import recipe as recipes  # noqa: E402
from hubtool.actions.resize import Options, resize  # noqa: E402
from hubtool.adapters.ir import Adapter, ModuleKey, Patch  # noqa: E402
from hubtool.adapters.low_rank import LowRank  # noqa: E402
from hubtool.cli.main import cli  # noqa: E402
from hubtool.errors import ConversionError, UsageProblem, WouldOverwrite  # noqa: E402
from hubtool.formats import open_file  # noqa: E402
from hubtool.layouts.parse import parse_file  # noqa: E402
from hubtool.ops.factor_space.budget import Budget  # noqa: E402
from hubtool.ops.merge_adapters import Request  # noqa: E402
from tests.support import adapters, patches  # noqa: E402

CONV = ("unet", "down_blocks.0.resnets.0.conv1")
Q = ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")


def best(change: Any, rank: int) -> Any:
    u, values, v = torch.linalg.svd(change.double().flatten(1), full_matrices=False)
    return (u[:, :rank] * values[:rank] @ v[:rank]).reshape(change.shape)


def found(path: Path) -> dict[ModuleKey, Patch]:
    return dict(parse_file(open_file(path), "sd1").adapter.patches)


def one(path: Path, key: ModuleKey, patch: Patch, layout: str = "kohya", **metadata: str) -> Path:
    return adapters.write(Adapter("sd1", MappingProxyType({key: patch})), path, layout, metadata)


def changed(path: Path, key: ModuleKey) -> Any:
    return found(path)[key].delta().double()


@pytest.fixture
def style(tmp_path: Path) -> Path:
    made = adapters.make("sd1", adapters.attention("sd1", 3), ranks=(8, 12), alphas=(4.0, 12.0), dtype="F16")
    return adapters.write(made, tmp_path / "style.safetensors", "kohya", {"ss_training_comment": "mine"})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def test_every_module_becomes_the_best_of_its_rank(style: Path, out: Path) -> None:
    done = resize(style, out, Request(budget=Budget(rank=3), dtype="fp32"))
    for key, patch in found(out).items():
        change = found(style)[key].delta()
        assert (patch.rank, patch.alpha_value) == (3, 3.0)
        least = float((best(change, 3) - change).norm())
        assert float((patch.delta() - change).norm()) <= 1.0001 * least
        assert done.report.errors()[".".join(key)] == pytest.approx(least / float(change.norm()), rel=1e-4)


def test_the_outputs_dtype_is_the_inputs_and_its_rounding_is_part_of_the_error(style: Path, out: Path) -> None:
    done = resize(style, out, Request(budget=Budget(rank=8)))
    assert {ref.dtype for ref in open_file(out).tensors.values()} == {"F16"}
    twelve = [name for name, error in done.report.errors().items() if error > 1e-2]
    assert len(twelve) == sum(patch.rank == 12 for patch in found(style).values())
    assert {row.how for row in done.report.modules.values()} == {"copied", "truncated"}


@pytest.mark.parametrize("kind", ["locon", "tucker"])
def test_convolutions_and_tucker_cores_are_resized(tmp_path: Path, out: Path, kind: str) -> None:
    ones, inside = (1, 1), (320, 3, 3)
    up = adapters.values((320, 6, *ones), 1)
    plain = LowRank(up, adapters.values((6, *inside), 2), alpha_value=3.0)
    tucker = LowRank(up, adapters.values((6, 320, *ones), 2), mid=adapters.values((6, 6, 3, 3), 3), alpha_value=3.0)
    source = one(tmp_path / "a.safetensors", CONV, plain if kind == "locon" else tucker)
    resize(source, out, Request(budget=Budget(rank=2)))
    change, now = changed(source, CONV), found(out)[CONV]
    assert (now.rank, now.algorithm, now.weight_shape) == (2, "locon", (320, 320, 3, 3))
    assert float((now.delta() - change).norm()) <= 1.0001 * float((best(change, 2) - change).norm())


def test_a_tucker_core_that_is_no_longer_needed_is_folded_without_loss(tmp_path: Path, out: Path) -> None:
    tucker = LowRank(
        adapters.values((320, 4, 1, 1), 1), adapters.values((4, 320, 1, 1), 2), mid=adapters.values((4, 4, 3, 3), 3)
    )
    source = one(tmp_path / "a.safetensors", CONV, tucker)
    resize(source, out, Request(budget=Budget(rank=16)))
    torch.testing.assert_close(changed(out, CONV), changed(source, CONV), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["loha", "lokr, w2 decomposed"])
def test_a_loha_or_lokr_becomes_the_nearest_lora(tmp_path: Path, out: Path, name: str) -> None:
    patch, _ = patches.CASES[name]
    source = adapters.write(Adapter("sd1", MappingProxyType({Q: patch})), tmp_path / "a.safetensors", "lycoris")
    resize(source, out, Request(budget=Budget(rank=2), dtype="fp32"))
    change, now = changed(source, Q), found(out)[Q]
    assert now.algorithm == "lora"
    assert float((now.delta() - change).norm()) <= 1.0001 * float((best(change, 2) - change).norm())


def test_a_dora_keeps_its_magnitude(tmp_path: Path, out: Path) -> None:
    patch = adapters.make("sd1", [Q], ranks=(6,)).patches[Q]
    source = one(tmp_path / "a.safetensors", Q, replace(patch, dora_scale=adapters.values((320,), 9)))  # type: ignore[type-var]
    resize(source, out, Request(budget=Budget(rank=2)))
    base, before, after = torch.ones(320, 320), found(source)[Q], found(out)[Q]
    assert after.rank == 2
    assert after.dora_scale is not None
    near = replace(before, up=after.up, down=after.down, alpha=None, alpha_value=2.0)  # type: ignore[type-var]
    torch.testing.assert_close(after.delta(base), near.delta(base))


def test_norms_and_whole_differences_stay_as_they_are(tmp_path: Path, out: Path) -> None:
    lora = adapters.make("sd1", [Q], ranks=(6,)).patches[Q]
    full, norm = patches.CASES["full"][0], patches.CASES["norm"][0]
    keys = {Q: lora, ("unet", "conv_in"): full, ("unet", "conv_norm_out"): norm}
    source = adapters.write(Adapter("sd1", MappingProxyType(keys)), tmp_path / "a.safetensors", "lycoris")
    done = resize(source, out, Request(budget=Budget(rank=2)))
    assert [row.how for row in done.report.modules.values()] == ["truncated", "copied", "copied"]
    assert torch.equal(changed(out, ("unet", "conv_in")), changed(source, ("unet", "conv_in")))


def test_alpha_may_be_chosen(style: Path, out: Path) -> None:
    resize(style, out, Request(budget=Budget(rank=4), alpha=1.0, dtype="fp32"))
    for key, patch in found(out).items():
        assert patch.alpha_value == 1.0
        wanted = best(found(style)[key].delta(), 4)
        torch.testing.assert_close(patch.delta().double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("budget", [Budget(error=0.3), Budget(energy=0.91), Budget(error=0.3, across=True)])
def test_targets_are_met_with_ranks_that_differ(style: Path, out: Path, budget: Budget) -> None:
    done = resize(style, out, Request(budget=budget, dtype="fp32"))
    assert done.report.error is not None
    assert done.report.error <= (budget.target or 0) + 1e-6
    assert len({patch.rank for patch in found(out).values()}) > 1


def test_a_target_takes_no_more_ranks_than_it_needs(style: Path, out: Path) -> None:
    resize(style, out, Request(budget=Budget(error=0.3), dtype="fp32"))
    for key, patch in found(out).items():
        change = found(style)[key].delta()
        fewer = float((best(change, (patch.rank or 1) - 1) - change).norm() / change.norm())
        assert fewer > 0.3


def test_scales_survive_in_a_layout_that_keeps_them_in_metadata(style: Path, out: Path) -> None:
    resize(style, out, Request(budget=Budget(rank=8), layout="diffusers"))
    for key, patch in found(out).items():
        before = found(style)[key]
        if before.rank == 8:
            assert patch.scale == before.scale
            assert torch.equal(patch.delta(), before.delta())


def test_the_headers_rank_alpha_and_comment_are_those_of_the_output(style: Path, out: Path) -> None:
    resize(style, out, Request(budget=Budget(rank=4)))
    metadata = open_file(out).metadata
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "4")
    assert metadata["ss_training_comment"] == "ranks 8 to 12 resized to 4; mine"


def test_nothing_to_resize_is_an_error_that_names_the_next_step(style: Path, out: Path) -> None:
    with pytest.raises(ConversionError, match="nothing to resize") as error:
        resize(style, out, Request(budget=Budget(rank=64)))
    assert "inspect" in (error.value.hint or "")
    with pytest.raises(UsageProblem, match="to what"):
        resize(style, out, Request())
    assert not out.exists()


def test_an_existing_output_is_kept_unless_forced(style: Path, out: Path) -> None:
    out.write_bytes(b"mine")
    with pytest.raises(WouldOverwrite):
        resize(style, out, Request(budget=Budget(rank=4)))
    assert out.read_bytes() == b"mine"
    resize(style, out, Request(budget=Budget(rank=4)), Options(force=True))
    assert found(out)


def test_the_recipe_in_the_output_gives_the_same_bytes(style: Path, out: Path) -> None:
    resize(style, out, Request(budget=Budget(error=0.2, across=True), dtype="fp32", layout="diffusers"))
    assert recipes.check(out).same


# --- the command -------------------------------------------------------------------------------------------------------


def hubtool(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, ["-q", "resize", *map(str, args)], prog_name="hubtool")


def test_the_command_tells_ranks_and_error(style: Path, out: Path) -> None:
    done = hubtool(style, "--rank", "4", "-o", out)
    assert done.exit_code == 0, done.output
    assert "rank 8..12 -> 4" in done.stdout
    assert "of its energy kept" in done.stdout


def test_json_has_every_module(style: Path, out: Path) -> None:
    document = json.loads(hubtool(style, "--rank", "4", "-o", out, "--json").stdout)
    assert document["output"] == str(out)
    assert document["ranks"] == [4]
    rows = document["by_module"].values()
    assert all(0 < row["relative_error"] < 1 for row in rows)
    assert document["relative_error"] <= max(row["relative_error"] for row in rows)


def test_a_dry_run_writes_nothing_and_knows_the_ranks(style: Path, out: Path) -> None:
    document = json.loads(hubtool(style, "--error", "0.3", "--dry-run", "--json").stdout)
    assert document["output"] is None
    assert len(document["ranks"]) > 1
    assert not out.exists()


def test_a_size_is_kept(style: Path, out: Path) -> None:
    done = hubtool(style, "--budget", "60KB", "-o", out)
    assert done.exit_code == 0, done.output
    assert 40_000 < sum(ref.nbytes for ref in open_file(out).tensors.values()) <= 60_100


@pytest.mark.parametrize(
    ("options", "code"),
    [(["--rank", "4", "--error", "0.1"], 2), (["--energy", "2"], 2), ([], 2), (["--rank", "99"], 1)],
)
def test_requests_without_sense_are_refused(style: Path, out: Path, options: list[str], code: int) -> None:
    assert hubtool(style, *options, "-o", out).exit_code == code
    assert not out.exists()
