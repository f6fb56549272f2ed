"""Which kinds of adapters can be one: every pair of kinds is either their exact sum or a refusal that says why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hubtool.adapters.ir import Patch  # noqa: E402
from hubtool.errors import ShapeMismatch, Unsupported  # noqa: E402
from tests.support import patches  # noqa: E402
from tests.support.merging import merged  # noqa: E402

LINEAR = {name: patch for name, (patch, shape) in patches.CASES.items() if shape == patches.LINEAR}
ADDED = {"lora", "locon", "loha", "lokr", "full", "sparse"}  # algorithms whose change knows nothing of the base
FIRST, SECOND = 0.7, -0.4


def is_sum(one: Patch, other: Patch) -> bool:
    """The table of ``hubtool merge --help``, as the test sees it."""
    if one.algorithm == other.algorithm == "ia3":
        return _vector(one) == _vector(other)
    return all(patch.algorithm in ADDED and not patch.needs_base for patch in (one, other))


def _vector(patch: Any) -> tuple[str, bool]:
    return patch.axis, patch.ia3 is None


def change(patch: Patch, base: Any) -> Any:
    return patch.delta(base).double().reshape(base.shape)


@pytest.mark.parametrize("name", LINEAR)
def test_every_pair_of_kinds_is_their_sum_or_refused_with_the_reason(name: str) -> None:
    torch.manual_seed(3)
    base, bias = torch.randn(patches.LINEAR), torch.randn(patches.OUT)
    one = LINEAR[name]
    for other_name, other in LINEAR.items():
        if not is_sum(one, other):
            with pytest.raises(Unsupported) as error:
                merged({0: one, 1: other}, (FIRST, SECOND))
            assert error.value.hint, (name, other_name)
            continue
        made = merged({0: one, 1: other}, (FIRST, SECOND))
        wanted = FIRST * change(one, base) + SECOND * change(other, base)
        torch.testing.assert_close(change(made, base), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max() + 1e-9))
        biases = [part * b for part, p in ((FIRST, one), (SECOND, other)) if (b := p.bias_delta(bias)) is not None]
        found = made.bias_delta(bias)
        assert (found is None) == (not biases), (name, other_name)
        if biases:
            torch.testing.assert_close(found, sum(biases), rtol=1e-4, atol=1e-5)


def test_the_table_knows_every_algorithm() -> None:
    assert {patch.algorithm for patch in LINEAR.values()} == {
        *("lora", "loha", "lokr", "oft", "boft", "glora", "full", "set", "sparse", "ia3")
    }


@pytest.mark.parametrize("names", [("locon", "tucker"), ("tucker", "loha, tucker"), ("locon", "lokr, tucker")])
def test_convolutions_of_unlike_kinds_add_up(names: tuple[str, str]) -> None:
    one, other = (patches.CASES[name][0] for name in names)
    base = torch.zeros(patches.CONV)
    wanted = FIRST * change(one, base) + SECOND * change(other, base)
    found = change(merged({0: one, 1: other}, (FIRST, SECOND)), base)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ia3 on outputs", "ia3 of peft on outputs", "ia3 of peft on inputs"])
@pytest.mark.parametrize("strength", [0.5, -2.0])
def test_ia3_takes_a_strength(name: str, strength: float) -> None:
    patch, shape = patches.CASES[name]
    torch.manual_seed(1)
    base, bias = torch.randn(shape), torch.randn(patches.OUT)
    made = merged({0: patch}, (strength,))
    assert made.algorithm == "ia3"
    torch.testing.assert_close(made.delta(base), strength * patch.delta(base))
    changed = patch.bias_delta(bias)
    if changed is not None:
        torch.testing.assert_close(made.bias_delta(bias), strength * changed)


def test_ia3_vectors_of_unlike_lengths_are_refused() -> None:
    one: Any = patches.CASES["ia3 on outputs"][0]
    other = replace(one, ia3=patches.literal(torch.ones(patches.OUT * 2)))
    with pytest.raises(ShapeMismatch, match="16 and of 32"):
        merged({0: one, 1: other}, (1.0, 1.0))


def test_an_ia3_vector_beside_a_lora_says_why_it_cannot() -> None:
    with pytest.raises(Unsupported, match="IA3 rescales the base weight") as error:
        merged({0: LINEAR["lora"], 1: LINEAR["ia3 on outputs"]}, (1.0, 1.0))
    assert "collapse" in (error.value.hint or "")
