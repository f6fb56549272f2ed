"""Promotion to LoRA: the change is the same number for number, the rank is the smallest these factors allow, the company travels along."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from hubtool.adapters import registry  # noqa: E402
from hubtool.adapters.hadamard import Hadamard  # noqa: E402
from hubtool.adapters.kronecker import Kronecker  # noqa: E402
from hubtool.adapters.low_rank import LowRank  # noqa: E402
from hubtool.adapters.promote import to_lora  # noqa: E402
from hubtool.adapters.weight_ops import ReshapeWeight  # noqa: E402
from hubtool.errors import Unsupported  # noqa: E402
from hubtool.formats import open_file  # noqa: E402
from hubtool.layouts import parse_file, vocabulary  # noqa: E402
from hubtool.layouts.modules import algorithm_of  # noqa: E402
from hubtool.tensors.evaluate import compute  # noqa: E402
from hubtool.tensors.expr import Literal  # noqa: E402
from tests.support.adapters import values  # noqa: E402
from tests.support.patches import CASES, base, patch  # noqa: E402

PROMOTED = [name for name, (made, _) in CASES.items() if isinstance(made, LowRank | Hadamard | Kronecker)]
REFUSED = {
    "oft": "a rotation", "boft": "a rotation", "oft of peft": "a rotation", "glora": "contains the base weight", "set": "replaced",
    "ia3 on outputs": "rescales", "full": "below its full rank", "norm": "no matrix", "sparse": "sparse residual",
}  # fmt: skip


def exact(patch_: Any) -> torch.Tensor:
    """The change of a promoted patch in fp64, from its stored factors."""
    up, down = compute(patch_.up).double().flatten(1), compute(patch_.down).double().flatten(1)
    return patch_.scale * up @ down


@pytest.mark.parametrize("case", PROMOTED)
def test_the_change_survives(case: str) -> None:
    made, shape = CASES[case]
    lora = to_lora(made)
    lora.check("the module")
    assert lora.mid is None
    assert lora.weight_shape == shape
    assert torch.allclose(lora.delta(base(shape)), made.delta(base(shape)), atol=2e-5)


@pytest.mark.parametrize("case", PROMOTED)
def test_what_accompanies_the_factors_is_kept(case: str) -> None:
    made = CASES[case][0]
    before, after = dict(made.roles()), dict(to_lora(made).roles())
    for role in ("dora_scale", "bias", "diff_b", "bias_indices", "bias_values", "bias_size"):
        assert after.get(role) == before.get(role)
    assert to_lora(made).scale == pytest.approx(made.scale)


@pytest.mark.parametrize("case", REFUSED)
def test_kinds_without_a_low_rank_form_are_refused_with_the_reason(case: str) -> None:
    with pytest.raises(Unsupported, match=REFUSED[case]) as caught:
        to_lora(CASES[case][0])
    assert "SVD" in str(caught.value.hint)


def test_a_lora_is_itself() -> None:
    assert to_lora(CASES["locon"][0]) is CASES["locon"][0]


def test_tucker_keeps_its_rank_and_its_stored_up() -> None:
    made = CASES["tucker"][0]
    lora = to_lora(made)
    assert lora.rank == made.rank
    assert lora.up is made.up
    assert lora.alpha is made.alpha


sizes = st.integers(1, 5)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(sizes, sizes, sizes, sizes, sizes, sizes),
    st.sampled_from(["full", "w1", "w2", "both"]),
    st.integers(0, 99),
)
def test_a_kronecker_product_has_the_product_of_its_halves_ranks(
    shape: tuple[int, ...], decomposed: str, seed: int
) -> None:
    a, b, c, d, r, s = shape
    first = {"lokr_w1_a": (a, r), "lokr_w1_b": (r, c)} if decomposed in ("w1", "both") else {"lokr_w1": (a, c)}
    second = {"lokr_w2_a": (b, s), "lokr_w2_b": (s, d)} if decomposed in ("w2", "both") else {"lokr_w2": (b, d)}
    made = patch("lokr", first | second, seed, alpha=2.0)
    lora = to_lora(made)
    halves = (min(a, c, r if "lokr_w1_a" in first else a), min(b, d, s if "lokr_w2_a" in second else b))
    assert lora.rank == halves[0] * halves[1] <= min(a * b, c * d)
    assert torch.allclose(exact(lora), made.delta().double(), atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_a_loha_has_the_square_of_its_rank_or_the_weights_own(out: int, inner: int, r: int, s: int, seed: int) -> None:
    shapes = {"hada_w1_a": (out, r), "hada_w1_b": (r, inner), "hada_w2_a": (out, s), "hada_w2_b": (s, inner)}
    made = patch("loha", shapes, seed, alpha=0.5)
    lora = to_lora(made)
    assert lora.rank == min(r * s, out, inner)
    assert torch.allclose(exact(lora), made.delta().double(), atol=1e-5)


def test_products_of_half_precision_factors_are_exact_in_fp32() -> None:
    made = Kronecker(
        lokr_w1_a=values((4, 2), 0, "F16"), lokr_w1_b=values((2, 5), 1, "F16"),
        lokr_w2_a=values((4, 2), 2, "F16"), lokr_w2_b=values((2, 6), 3, "F16"),
    )  # fmt: skip
    lora = to_lora(made)
    assert (lora.up.dtype, lora.down.dtype) == ("F32", "F32")
    w1_a, w2_a = (compute(t).double() for t in (made.lokr_w1_a, made.lokr_w2_a) if t is not None)
    assert torch.equal(compute(lora.up).double(), torch.kron(w1_a, w2_a))


def test_factors_that_are_only_copied_keep_their_dtype() -> None:
    made = Kronecker(
        lokr_w1=values((2, 3), 0, "F16"), lokr_w2_a=values((4, 2), 2, "F16"), lokr_w2_b=values((2, 6), 3, "F16")
    )
    lora = to_lora(made)
    assert (lora.rank, lora.up.dtype, lora.down.dtype) == (4, "F16", "F32")  # up = kron(I, w2_a)


def test_a_flattened_convolution_takes_the_shape_it_is_given() -> None:
    made = replace(CASES["loha of a convolution"][0], shape=None)  # type: ignore[type-var]
    assert to_lora(made).weight_shape == (16, 72)
    lora = to_lora(made, (16, 8, 3, 3))
    assert lora.weight_shape == (16, 8, 3, 3)
    assert lora.algorithm == "locon"
    with pytest.raises(Unsupported, match="for a weight of shape"):
        to_lora(made, (16, 9, 3, 3))


def test_a_march_2023_lokr_becomes_a_locon() -> None:
    made, shape = CASES["lokr, early"]
    lora = to_lora(made)
    assert lora.weight_shape == shape
    assert torch.allclose(exact(lora).reshape(shape), made.delta().double(), atol=1e-5)


def test_a_real_lokr_becomes_a_lora_of_its_family(shared: Path) -> None:
    """Flattened convolution factors of March 2023 included: 48 of 50 do not divide the inputs, and LyCORIS itself cannot read them."""
    path = shared / "real" / "lycoris" / "KohakuBlueleaf__smart_falcon_4_lokr.safetensors"
    patches = parse_file(open_file(path)).adapter.patches
    assert len(patches) == 350
    convolutions = 0
    for i, ((component, name), made) in enumerate(patches.items()):
        shape = vocabulary.weight_shapes("sd1", component, name)[0]
        lora = to_lora(made, shape)
        assert lora.weight_shape == shape
        convolutions += len(shape) == 4 and shape[2] == 3
        if i % 50 == 0:
            assert torch.allclose(
                exact(lora).reshape(shape), made.under(ReshapeWeight(shape)).delta().double(), atol=1e-5
            )
    assert convolutions == 50


LISTS = (
    "gen_lycoris_sd1_diag_oft", "gen_lycoris_sd1_full", "gen_lycoris_sd1_locon", "gen_lycoris_sd1_locon_dora",
    "gen_lycoris_sd1_locon_norm", "gen_lycoris_sd1_locon_tucker", "gen_lycoris_sd1_loha", "gen_lycoris_sd1_loha_dora",
    "gen_lycoris_sd1_lokr", "gen_lycoris_sd1_lokr_fullmatrix", "gen_lycoris_sd1_lokr_tucker_both", "gen_kohya_sdxl_oft",
    "real_lycoris_lokr_dim4", "real_lycoris_lokr_dim16",
)  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_every_module_that_lycoris_and_sd_scripts_write_has_a_kind(name: str, shared: Path) -> None:
    listed = json.loads((shared / "keylists" / f"{name}.json").read_text("utf-8"))["tensors"]
    modules: dict[str, dict[str, Literal]] = {}
    for key, about in listed.items():
        stem, _, suffix = key.partition(".")
        role = {"lora_up.weight": "up", "lora_down.weight": "down", "lora_mid.weight": "mid"}.get(suffix, suffix)
        modules.setdefault(stem, {})[role] = Literal(b"", about["dtype"], tuple(about["shape"]))
    for stem, tensors in modules.items():
        algorithm = algorithm_of(tensors, stem, name)
        assert algorithm is not None
        registry.make(algorithm, tensors, 1.0).check(stem)
