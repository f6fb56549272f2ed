"""Weights of one shape, composed by one product: the same sums as one by one, whatever is moved, shared, interrupted or uneven."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hubtool.adapters.ir import Adapter
from hubtool.errors import BadValues
from hubtool.pipelines import batches, load
from hubtool.pipelines.batches import Batch
from hubtool.pipelines.composition import Composition
from hubtool.pipelines.schedule_weights import gated
from hubtool.pipelines.schedules import Schedule, linear, scheduled
from tests.support import tiny
from tests.support.schedules import STEPS, UP_Q, Q, loha, patch, weight

CURVE = [1.0, -0.5, 0.25, 0.75]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def pipe() -> Any:
    return tiny.build("sd1")


class Products(TorchDispatchMode):  # type: ignore[misc]
    """Counts the products that PyTorch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "mm" in func.__name__
        return func(*args, **(kwargs or {}))


def shapes(pipe: Any, made: tiny.Made) -> set[torch.Size]:
    return {module.weight.shape for _, path, module in tiny.modules(pipe, ["unet"]) if ("unet", path) in made.factors}


def walk(composition: Composition) -> None:
    for step in range(STEPS):
        composition.at(step)


def check(pipe: Any, before: tiny.State, made: tiny.Made, strength: float, other: tuple[str, float] = ("", 0)) -> None:
    """Every weight of the UNet is what the formula says in fp64; weights whose path starts with ``other`` have another strength."""
    for name, value in tiny.weights(pipe)["unet"].items():
        key, old = ("unet", name.removesuffix(".weight")), before["unet"][name]
        expected = old.double()
        if name.endswith(".weight") and key in made.factors:
            own = other[1] if other[0] and name.startswith(other[0]) else strength
            expected = expected + made.delta(key, own).reshape(old.shape)
        close = {torch.float32: 2e-6, torch.float64: 1e-12, torch.float16: 2e-3}[value.dtype]
        torch.testing.assert_close(value.double(), expected, rtol=close, atol=close)


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_a_change_of_strengths_costs_one_product_for_each_shape(
    pipe: Any, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_CACHED", 1 << 30)
    made, before = tiny.make(pipe, ["unet"]), tiny.weights(pipe)
    with scheduled(pipe, [(made.adapter, CURVE)], steps=STEPS, cache_bytes=limit) as composition:
        for step in range(1, STEPS):
            with Products() as products:
                composition.at(step)
            assert products.count == len(shapes(pipe, made)) < len(made.factors) / 4
            check(pipe, before, made, CURVE[step])
        with Products() as products:
            composition.at(1)
        assert (products.count == 0) == (limit > 0)
    assert tiny.same(tiny.weights(pipe), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_cache_does_not_change_a_bit(pipe: Any, dtype: torch.dtype) -> None:
    pipe.unet.to(dtype)
    pairs = [(tiny.make(pipe, ["unet"], seed=seed).adapter, linear(0.1 * seed, 0.0)) for seed in (1, 2, 3)]
    seen = []
    for limit in (0, 1000, 1 << 30):
        with scheduled(pipe, pairs, steps=STEPS, cache_bytes=limit) as composition:
            for step in (1, 0, 2, 1):
                composition.at(step)
            seen.append(tiny.weights(pipe))
    assert tiny.same(seen[0], seen[1])
    assert tiny.same(seen[0], seen[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_together_or_alone_is_the_same_sum(pipe: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.unet.to(dtype)
    made, seen = tiny.make(pipe, ["unet"], alphas=(2.0, None)), []
    for alone in (False, True):
        monkeypatch.setattr(batches, "_joins", lambda weight, alone=alone: not alone)
        with scheduled(pipe, [(made.adapter, CURVE)], steps=STEPS) as composition:
            assert any(isinstance(slot, Batch) for slot in composition.slots) != alone
            seen.append(tiny.weights(pipe)["unet"])
    close = 1e-6 if dtype == torch.float32 else 1e-14
    for name, value in seen[0].items():
        torch.testing.assert_close(value, seen[1][name], rtol=close, atol=close)


def test_members_may_differ_in_rank_and_in_strength(pipe: Any) -> None:
    made, before = tiny.make(pipe, ["unet"], only="attn", ranks=(4, 3, 7), alphas=(2.0,)), tiny.weights(pipe)
    parts = {"unet:up_blocks": 0.5}
    with scheduled(pipe, [(made.adapter, Schedule(CURVE, parts))], steps=STEPS) as composition:
        assert len(composition.slots) == len(shapes(pipe, made))
        for step in (2, 1, 3):
            composition.at(step)
            check(pipe, before, made, CURVE[step], ("up_blocks", CURVE[step] / 2))


def test_what_changes_at_other_steps_is_left_alone(pipe: Any) -> None:
    made, before = tiny.make(pipe, ["unet"], only="attn"), tiny.weights(pipe)
    curves = Schedule(1.0, {"unet:up_blocks": CURVE, "unet:mid_block": 0.0})
    mid = next(path for _, path in made.factors if path.startswith("mid_block"))
    with scheduled(pipe, [(made.adapter, curves)], steps=STEPS, cache_bytes=0) as composition:
        still, moving = pipe.unet.get_submodule(Q).weight, pipe.unet.get_submodule(UP_Q).weight
        still.data = still.data + 1  # stands out, and would be written over
        for step in (1, 2, 3):
            composition.at(step)
            assert torch.equal(weight(pipe, mid), before["unet"][f"{mid}.weight"])
            expected = before["unet"][f"{UP_Q}.weight"].double() + made.delta(("unet", UP_Q), CURVE[step])
            torch.testing.assert_close(moving.double(), expected, rtol=2e-6, atol=2e-6)
        assert (still - before["unet"][f"{Q}.weight"]).mean() > 0.5
    assert tiny.same(tiny.weights(pipe), before)


def test_without_a_cache_every_step_uses_the_same_memory(pipe: Any) -> None:
    made = tiny.make(pipe, ["unet"], only="attn1.to_q")
    with scheduled(pipe, [(made.adapter, CURVE)], steps=STEPS, cache_bytes=0) as composition:
        places = set()
        for step in range(STEPS):
            composition.at(step)
            places.add(pipe.unet.get_submodule(Q).weight.data_ptr())
        assert len(places) == 1
        assert composition.store.used == 0


@pytest.mark.parametrize(("largest", "cached"), [(3000, 1), (1 << 20, 3000)])
def test_batches_and_their_parts_keep_to_the_memory_lent(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, largest: int, cached: int
) -> None:
    monkeypatch.setattr(batches, "_LARGEST", largest)
    monkeypatch.setattr(batches, "_CACHED", cached)
    made, before = tiny.make(pipe, ["unet"], only="attn1.to_q"), tiny.weights(pipe)
    with scheduled(pipe, [(made.adapter, CURVE)], steps=STEPS, cache_bytes=0) as composition:
        sizes = [slot.buffer.nbytes for slot in composition.slots if isinstance(slot, Batch)]
        assert sizes
        assert max(sizes) <= largest
        composition.at(2)
        check(pipe, before, made, CURVE[2])
    assert tiny.same(tiny.weights(pipe), before)


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_a_part_that_is_cast_inside_goes_its_own_way_and_comes_back(pipe: Any, limit: int) -> None:
    made, before = tiny.make(pipe, ["unet"], only="attn"), tiny.weights(pipe)
    with scheduled(pipe, [(made.adapter, CURVE)], steps=STEPS, cache_bytes=limit) as composition:
        pipe.unet.mid_block.half()
        composition.at(1)
        assert weight(pipe, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q").dtype == torch.float16
        check(pipe, before, made, CURVE[1])
        pipe.unet.mid_block.float()
        composition.at(2)
        composition.at(3)
        for path in (Q, UP_Q):
            expected = before["unet"][f"{path}.weight"].double() + made.delta(("unet", path), CURVE[3])
            torch.testing.assert_close(weight(pipe, path).double(), expected, rtol=2e-6, atol=2e-6)
    changed = {name for _, path in made.factors for name in (f"{path}.weight",)}
    after = tiny.weights(pipe)["unet"]
    assert all(torch.equal(after[name], before["unet"][name]) for name in changed)


def test_a_pipeline_that_is_cast_inside_stays_together(pipe: Any) -> None:
    made = tiny.make(pipe, ["unet"], only="attn")
    before = tiny.weights(pipe)
    with scheduled(pipe, [(made.adapter, CURVE)], steps=STEPS, cache_bytes=0) as composition:
        pipe.unet.double()
        with Products() as products:
            composition.at(1)
        assert products.count == len(shapes(pipe, made))
        assert weight(pipe).dtype == torch.float64
        torch.testing.assert_close(
            weight(pipe), before["unet"][f"{Q}.weight"].double() + made.delta(("unet", Q), CURVE[1]), rtol=2e-6, atol=2e-6
        )  # fmt: skip
    assert torch.equal(weight(pipe), before["unet"][f"{Q}.weight"].double())


def test_a_parameter_that_was_given_other_memory_is_found_again(pipe: Any) -> None:
    made, before = tiny.make(pipe, ["unet"], only="attn1"), tiny.weights(pipe)
    with scheduled(pipe, [(made.adapter, CURVE)], steps=STEPS, cache_bytes=0) as composition:
        module = pipe.unet.get_submodule(Q)
        module.weight.data = module.weight.data.clone()
        composition.at(1)
        check(pipe, before, made, CURVE[1])
        module.weight = torch.nn.Parameter(module.weight.detach().clone())
        composition.at(2)
        check(pipe, before, made, CURVE[2])
    assert tiny.same(tiny.weights(pipe), before)


def test_a_weight_that_two_modules_share_stays_one(pipe: Any) -> None:
    second = Q.replace("attn1", "attn2")
    made = tiny.make(pipe, ["unet"], only={Q, second})
    pipe.unet.get_submodule(second).weight = pipe.unet.get_submodule(Q).weight
    before = tiny.weights(pipe)
    with scheduled(pipe, [(made.adapter, CURVE)], steps=STEPS, cache_bytes=0) as composition:
        for step in (1, 2):
            composition.at(step)
            assert pipe.unet.get_submodule(second).weight is pipe.unet.get_submodule(Q).weight
            deltas = [
                before["unet"][f"{Q}.weight"].double() + made.delta(("unet", p), CURVE[step]) for p in (Q, second)
            ]
            assert any(torch.allclose(weight(pipe).double(), one, rtol=2e-6, atol=2e-6) for one in deltas)
    assert tiny.same(tiny.weights(pipe), before)


def test_the_one_weight_of_many_that_overflows_is_named(pipe: Any) -> None:
    made, before = tiny.make(pipe, ["unet"], only="attn1.to_q"), tiny.weights(pipe)
    big = {"up": torch.full((16, 4), 1e20), "down": torch.full((4, 16), 1e18)}
    patches = {**made.adapter.patches, ("unet", Q): patch("lora", big)}
    with (
        scheduled(pipe, [(Adapter(None, patches), [0.1, 10.0])], steps=2) as composition,
        pytest.raises(BadValues, match=rf"unet\.{Q}\.weight holds NaN or infinity"),
    ):
        composition.at(1)
    assert tiny.same(tiny.weights(pipe), before)


def test_after_strengths_that_were_refused_others_are_still_right(pipe: Any) -> None:
    made, before = tiny.make(pipe, ["unet"], only="attn1.to_q"), tiny.weights(pipe)
    with scheduled(pipe, [(made.adapter, [0.5, 1e6, 0.25])], steps=3, cache_bytes=0) as composition:
        pipe.unet.half()
        with pytest.raises(BadValues):
            composition.at(1)
        composition.at(2)
        expected = before["unet"][f"{Q}.weight"].double() + made.delta(("unet", Q), 0.25)
        torch.testing.assert_close(weight(pipe).double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("calls", [1, 5, 12])
def test_every_bit_returns_when_a_product_is_interrupted(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    made, before, done = tiny.make(pipe, ["unet"]), tiny.weights(pipe), [0]

    def interrupted(*factors: Any) -> Any:
        done[0] += 1
        if done[0] == calls:
            raise KeyboardInterrupt
        return gated(*factors)

    monkeypatch.setattr(batches, "gated", interrupted)
    with pytest.raises(KeyboardInterrupt), scheduled(pipe, [(made.adapter, CURVE)], steps=STEPS, cache_bytes=0) as one:
        walk(one)
    assert tiny.same(tiny.weights(pipe), before)


def test_others_of_the_same_shape_go_on_without_the_batch(pipe: Any) -> None:
    made, before = tiny.make(pipe, ["unet"], only="attn1"), tiny.weights(pipe)
    with scheduled(pipe, [(made.adapter, CURVE), (loha(), CURVE)], steps=STEPS, cache_bytes=0) as composition:
        composition.at(1)
        assert {len(slot.members) for slot in composition.slots if isinstance(slot, Batch)}
        expected = before["unet"][f"{UP_Q}.weight"].double() + made.delta(("unet", UP_Q), CURVE[1])
        torch.testing.assert_close(weight(pipe, UP_Q).double(), expected, rtol=2e-6, atol=2e-6)
        own = weight(pipe).double() - before["unet"][f"{Q}.weight"].double() - made.delta(("unet", Q), CURVE[1])
        change = loha().patches["unet", Q].delta(torch.zeros(16, 16)).double() * CURVE[1]
        torch.testing.assert_close(own, change, rtol=1e-5, atol=2e-6)
    assert tiny.same(tiny.weights(pipe), before)


def test_an_adapter_inside_the_weights_stays_in_every_sum(pipe: Any) -> None:
    before, inside, made = tiny.weights(pipe), tiny.make(pipe, ["unet"], seed=4), tiny.make(pipe, ["unet"])
    load(pipe, inside.adapter, name="inside", strength=0.3, collapse=True)
    loaded = tiny.weights(pipe)
    with scheduled(pipe, [(made.adapter, CURVE)], steps=STEPS, cache_bytes=0) as composition:
        composition.at(3)
        for path in (Q, UP_Q):
            key = ("unet", path)
            expected = before["unet"][f"{path}.weight"].double() + inside.delta(key, 0.3) + made.delta(key, CURVE[3])
            torch.testing.assert_close(weight(pipe, path).double(), expected, rtol=2e-6, atol=4e-6)
    assert tiny.same(tiny.weights(pipe), loaded)
