"""Strengths by step and by part: against sums done by hand in fp64, and back to the same bits however the loop ends."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hubtool.adapters.ir import Adapter
from hubtool.errors import BadValues, LoadMismatch, Unsupported, UsageProblem
from hubtool.ops import strengths as block_strengths
from hubtool.pipelines import live, load
from hubtool.pipelines.schedule_store import TensorStore
from hubtool.pipelines.schedules import Schedule, cosine, linear, phases, scheduled
from tests.support import tiny
from tests.support.schedules import FF, STEPS, UP_Q, Q, flux, loha, patch, rand, run, watched, weight


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def pipe() -> Any:
    return tiny.build("sd1")


FAMILIES: dict[str, tuple[Callable[[], Any], str, Sequence[str]]] = {
    "sd1": (lambda: tiny.build("sd1"), "unet", ("attn", "conv1")),
    "sdxl": (lambda: tiny.build("sdxl"), "unet", ("attn2.to_k", "ff.net")),
    "flux": (flux, "transformer", ("attn.to_q", "proj_out")),
}


# the rotary positions of diffusers' Flux are fp32
EXACT = [*((family, torch.float32) for family in FAMILIES), ("sd1", torch.float64), ("sdxl", torch.float64)]


@pytest.mark.parametrize(("family", "dtype"), EXACT)
def test_every_weight_is_what_the_formula_says_at_every_step(family: str, dtype: torch.dtype) -> None:
    build, component, (first, second) = FAMILIES[family]
    pipe = build()
    one = tiny.make(pipe, [component], only=first, alphas=(2.0,))
    two = tiny.make(pipe, [component], only=second, ranks=(3, 2), seed=5)
    three = tiny.make(pipe, [component], only=first, seed=9)
    pipe.to(dtype)
    before = tiny.weights(pipe)
    curves = {"one": [1.0, -0.5, 0.25, 0.0], "two": [0.8, 0.8, 0.1, 0.1], "three": [0.0, 0.1, 0.2, 0.3]}
    made = {"one": one, "two": two, "three": three}
    pairs = [(made[name].adapter, curve) for name, curve in curves.items()]
    with scheduled(pipe, pairs, steps=STEPS):
        seen = watched(pipe, lambda: tiny.weights(pipe)[component])
    assert len(seen) == STEPS
    for step, state in enumerate(seen):
        for name, value in state.items():
            key, old = (component, name.removesuffix(".weight")), before[component][name]
            expected = old.double().flatten(1) if old.dim() > 1 else old.double()
            for who, curve in curves.items():
                if name.endswith(".weight") and key in made[who].factors:
                    expected = expected + made[who].delta(key, curve[step])
            close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 2e-6}
            torch.testing.assert_close(value.double(), expected.reshape(old.shape), **close)
    assert tiny.same(tiny.weights(pipe), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_constant_schedule_makes_the_picture_of_a_loaded_adapter_and_never_swaps(family: str) -> None:
    build, component, (first, _) = FAMILIES[family]
    pipe, other = build(), build()
    made = tiny.make(pipe, [component], only=first)
    plain = run(pipe)
    load(other, made.adapter, strength=0.6, collapse=True)
    with scheduled(pipe, [(made.adapter, 0.6)], steps=STEPS) as composition:
        torch.testing.assert_close(run(pipe), run(other), rtol=1e-4, atol=1e-4)
        run(pipe)
        assert composition.swaps == 1
        assert composition.store.used == 0
    assert torch.equal(run(pipe), plain)


def test_two_phases_swap_once_a_run_and_compute_each_weight_once(pipe: Any) -> None:
    made = tiny.make(pipe, ["unet"], only="attn")
    shapes = {module.weight.shape for _, path, module in tiny.modules(pipe, ["unet"]) if ("unet", path) in made.factors}
    with scheduled(pipe, [(made.adapter, phases({0.0: 0.9, 0.5: 0.3}))], steps=STEPS) as composition:
        run(pipe)
        assert composition.swaps == 2
        computed, picture = composition.store.made, run(pipe)
        assert composition.store.made == computed == 2 * len(shapes)  # by one product for all of a shape
        assert torch.equal(run(pipe), picture)


def test_steps_without_any_strength_point_to_the_original_itself(pipe: Any) -> None:
    made, original = tiny.make(pipe, ["unet"], only="attn"), pipe.unet.get_submodule(Q).weight.data_ptr()
    with scheduled(pipe, [(made.adapter, [1.0, 0.0, 0.0, 1.0])], steps=STEPS):
        seen = watched(pipe, lambda: pipe.unet.get_submodule(Q).weight.data_ptr() == original)
    assert seen == [False, True, True, False]
    assert pipe.unet.get_submodule(Q).weight.data_ptr() == original


@pytest.mark.parametrize("limit", [0, 1000, 1 << 30])
def test_the_cache_keeps_its_bound_and_the_picture_does_not_depend_on_it(limit: int) -> None:
    pipe = tiny.build("sd1")
    pairs = [(tiny.make(pipe, ["unet"], only="attn1").adapter, linear(1.0, 0.1)), (loha(), cosine(0.0, 1.0))]
    with scheduled(pipe, pairs, steps=STEPS) as composition:
        expected = run(pipe)
    with scheduled(pipe, pairs, steps=STEPS, cache_bytes=limit) as composition:
        assert torch.equal(run(pipe), expected)
        assert composition.store.used <= limit
        assert (composition.store.used > 0) == (limit > 1000)


def test_deltas_use_the_room_that_is_too_small_for_all_composed_weights(pipe: Any) -> None:
    delta = 16 * 16 * 4
    with scheduled(pipe, [(loha(), linear(1.0, 0.1))], steps=STEPS, cache_bytes=2 * delta) as composition:
        run(pipe)
        run(pipe)
        assert (composition.store.made, composition.store.used) == (1, delta)


def test_the_store_keeps_what_came_first() -> None:
    store, four = TensorStore(40), lambda: torch.zeros(4)
    first = store.get("a", four)
    store.get("b", four)
    third = store.get("c", four)
    assert store.used == 32
    assert store.get("a", four) is first
    assert store.get("c", four) is not third
    assert store.made == 4
    store.clear()
    assert store.used == 0


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("when", [0, 2])
def test_every_bit_returns_when_a_run_breaks_off(pipe: Any, error: type[BaseException], when: int) -> None:
    before, plain, kind = tiny.weights(pipe), run(pipe), type(pipe.scheduler)

    def fail(_: Any, step: int, *__: Any) -> dict[str, Any]:
        if step == when:
            raise error
        return {}

    pairs: list[Any] = [(tiny.make(pipe).adapter, linear(1.0, 0.0)), (loha(), 0.5)]
    with pytest.raises(error), scheduled(pipe, pairs, steps=STEPS):
        run(pipe, callback_on_step_end=fail)
    assert tiny.same(tiny.weights(pipe), before)
    assert type(pipe.scheduler) is kind
    assert torch.equal(run(pipe), plain)


def test_every_bit_returns_when_a_swap_is_interrupted_and_the_return_as_well(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hubtool.pipelines.schedule_weights import Weight

    before, calls = tiny.weights(pipe), []
    point = Weight.point

    def interrupted(self: Weight, value: Any) -> None:
        calls.append(self.key)
        if len(calls) in (40, 50):  # in the third swap of 16 weights, and while they all return
            raise KeyboardInterrupt
        point(self, value)

    monkeypatch.setattr(Weight, "point", interrupted)
    made = tiny.make(pipe, ["unet"], only="attn1.to_q")
    with pytest.raises(KeyboardInterrupt), scheduled(pipe, [(made.adapter, linear(1.0, 0.0))], steps=STEPS):
        run(pipe)
    assert (len(made.factors), len(calls)) == (16, 50 + 16)
    assert tiny.same(tiny.weights(pipe), before)


def test_strengths_that_overflow_are_refused_and_leave_nothing(pipe: Any) -> None:
    before = tiny.weights(pipe)
    adapter = Adapter(None, {("unet", Q): patch("full", {"diff": torch.full((16, 16), 3e38)})})
    pairs = [(tiny.make(pipe, ["unet"], only="attn2").adapter, 1.0), (adapter, 10.0)]
    with (
        pytest.raises(BadValues, match=r"unet\..*attn1.to_q.weight holds NaN or infinity"),
        scheduled(pipe, pairs, steps=2),
    ):
        pass
    assert tiny.same(tiny.weights(pipe), before)
    with scheduled(pipe, pairs[:1], steps=2):
        pass


def test_parts_have_their_own_factors_and_curves(pipe: Any) -> None:
    made, old = tiny.make(pipe, ["unet"]), {path: weight(pipe, path).double() for path in (Q, UP_Q, FF)}
    parts: dict[str, Any] = {"unet": 0.5, "unet:up_blocks": linear(0.0, 1.0), "*.ff.net.*": [1.0, 0.0, -1.0, 2.0]}
    with scheduled(pipe, [(made.adapter, Schedule([1.0, 1.0, 2.0, 2.0], parts))], steps=STEPS):
        seen = watched(pipe, lambda: {path: weight(pipe, path) for path in old})
    factors: dict[str, list[float]] = {Q: [0.5, 0.5, 1, 1], UP_Q: [0, 1 / 3, 4 / 3, 2], FF: [1, 0, -2, 4]}
    for step, state in enumerate(seen):
        for path, value in state.items():
            expected = old[path] + made.delta(("unet", path), factors[path][step])
            torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)


def test_block_strengths_serve_as_parts(pipe: Any) -> None:
    made, old = tiny.make(pipe, ["unet"], only="attn1.to_q"), weight(pipe)
    blocks = block_strengths.parse(["unet:up_blocks.*=0.25", "unet:down_blocks.*=0"])
    other = weight(pipe, UP_Q)
    with scheduled(pipe, [(made.adapter, Schedule(2.0, blocks.of))], steps=1):
        assert torch.equal(weight(pipe), old)
        expected = other.double() + made.delta(("unet", UP_Q), 0.5)
        torch.testing.assert_close(weight(pipe, UP_Q).double(), expected, rtol=2e-6, atol=2e-6)


def test_text_encoders_keep_the_strength_of_the_first_step(pipe: Any) -> None:
    made, path = tiny.make(pipe, ["text_encoder"], only="q_proj"), "encoder.layers.0.self_attn.q_proj"
    old = pipe.text_encoder.get_submodule(path).weight.detach().clone()
    with scheduled(pipe, [(made.adapter, linear(0.5, 0.0))], steps=STEPS) as composition:
        run(pipe)
        expected = old.double() + made.delta(("text_encoder", path), 0.5)
        now = pipe.text_encoder.get_submodule(path).weight
        torch.testing.assert_close(now.double(), expected, rtol=2e-6, atol=2e-6)
        assert composition.swaps == 1


def test_a_loaded_layer_follows_its_schedule_and_gets_its_strength_back(pipe: Any) -> None:
    made, other = tiny.make(pipe, ["unet"], only="attn", alphas=(2.0,)), tiny.build("sd1")
    load(pipe, made.adapter, name="style", strength=0.7)
    before = run(pipe)
    with scheduled(pipe, {"style": [1.0, 0.5, 0.0, -1.0]}, steps=STEPS):
        picture = run(pipe)
    with scheduled(other, [(made.adapter, [1.0, 0.5, 0.0, -1.0])], steps=STEPS):
        torch.testing.assert_close(picture, run(other), rtol=1e-4, atol=1e-4)
    assert torch.equal(run(pipe), before)
    for _, layer in live.layers(pipe.unet):
        layer.set_adapter([])
    with pytest.raises(UsageProblem, match="not active"), scheduled(pipe, {"style": 1.0}, steps=2):
        pass


def test_a_solver_of_second_order_stays_in_its_step(pipe: Any) -> None:
    from diffusers import HeunDiscreteScheduler

    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    made, steps = tiny.make(pipe, ["unet"], only=Q), []
    with scheduled(pipe, [(made.adapter, [1.0, 2.0, 3.0])], steps=3) as composition:
        steps = watched(pipe, lambda: composition.now, steps=3)
    assert steps == [0, 1, 1, 2, 2]


def test_a_copy_of_the_scheduler_goes_its_own_way(pipe: Any) -> None:
    with scheduled(pipe, [(tiny.make(pipe, ["unet"], only=Q).adapter, [1.0, 2.0, 3.0])], steps=3) as composition:
        pipe.scheduler.set_timesteps(3)
        other, sample = copy.deepcopy(pipe.scheduler), rand(1, 4, 8, 8)
        expected = copy.deepcopy(pipe.scheduler).step(sample, int(other.timesteps[0]), sample).prev_sample
        assert torch.equal(other.step(sample, int(other.timesteps[0]), sample).prev_sample, expected)
        assert composition.now == 0
        pipe.scheduler.step(sample, int(other.timesteps[0]), sample)
        assert composition.now == 1


def test_a_file_is_read_once_and_may_go(pipe: Any, tmp_path: Path) -> None:
    import safetensors.torch

    path = tmp_path / "style.safetensors"
    up, down = rand(16, 2), rand(2, 16)
    safetensors.torch.save_file({f"unet.{Q}.lora_B.weight": up, f"unet.{Q}.lora_A.weight": down}, path)
    old = weight(pipe).double()
    with scheduled(pipe, {path: linear(0.0, 1.0)}, steps=STEPS):
        path.unlink()
        seen = watched(pipe, lambda: weight(pipe))
    torch.testing.assert_close(seen[-1].double(), old + up.double() @ down.double(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        (linear(1.0, 0.0), [1, 0.75, 0.5, 0.25, 0]),
        (cosine(1.0, 0.0), [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0]),
        (phases({0.0: 1.0, 0.4: 0.5, 0.8: 0.0}), [1, 1, 0.5, 0.5, 0]),
        (phases({0.5: 1.0}), [0, 0, 1, 1, 1]),
    ],
)
def test_curves(curve: Callable[[int, int], float], expected: list[float]) -> None:
    assert [curve(step, 5) for step in range(5)] == pytest.approx(expected)


def test_a_single_step_is_the_first() -> None:
    assert (linear(0.3, 1.0)(0, 1), cosine(0.3, 1.0)(0, 1)) == (0.3, 0.3)


def test_what_makes_no_sense_is_refused_before_anything_changes(pipe: Any) -> None:
    before, adapter = tiny.weights(pipe), tiny.make(pipe, ["unet"], only="attn").adapter
    wrong: list[tuple[Any, type[Exception], str]] = [
        ([(adapter, [1.0, 2.0])], UsageProblem, "2 strengths for 4 steps"),
        ([(adapter, lambda step, _: 1 / (3 - step) if step < 3 else math.inf)], BadValues, "inf is no number"),
        ([(adapter, Schedule(1.0, {"unet:upblocks": 0.5}))], UsageProblem, "answers to unet:upblocks"),
        ([(Adapter("sdxl", adapter.patches), 1.0)], LoadMismatch, "is for sdxl"),
        ([("a.safetensors", 1.0), ("a.safetensors", 0.5)], UsageProblem, "a.safetensors has two schedules"),
        ([(Adapter(None, {}, (tiny.embedding("cat", 32),)), 1.0)], Unsupported, "token embeddings"),
    ]
    for pairs, error, words in wrong:
        with pytest.raises(error, match=words), scheduled(pipe, pairs, steps=STEPS):
            pass
    with pytest.raises(UsageProblem, match="0 steps"), scheduled(pipe, {}, steps=0):
        pass
    with pytest.raises(UsageProblem, match="shares of the steps"):
        phases({1.0: 0.5})
    assert tiny.same(tiny.weights(pipe), before)


def test_one_schedule_at_a_time(pipe: Any) -> None:
    adapter = tiny.make(pipe, ["unet"], only="attn").adapter
    with scheduled(pipe, [(adapter, 1.0)], steps=2):
        with (
            pytest.raises(UsageProblem, match="follows a schedule already"),
            scheduled(pipe, [(adapter, 1.0)], steps=2),
        ):
            pass
        assert not torch.equal(weight(pipe), weight(tiny.build("sd1")))
    assert torch.equal(weight(pipe), weight(tiny.build("sd1")))


def test_a_pipeline_without_a_scheduler_is_stepped_by_hand() -> None:
    pipe = tiny.build("flux1")
    made, path = tiny.make(pipe, ["transformer"], only="attn.to_q"), "transformer_blocks.0.attn.to_q"
    old = weight(pipe, path).double()
    with scheduled(pipe, [(made.adapter, lambda step, steps: step / steps)], steps=STEPS) as composition:
        for step in range(STEPS):
            composition.at(step)
            expected = old + made.delta(("transformer", path), step / STEPS)
            torch.testing.assert_close(weight(pipe, path).double(), expected, rtol=2e-6, atol=2e-6)
