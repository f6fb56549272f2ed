"""Hypernetworks: the formula against modules built as A1111 builds them, the exact collapse, and what cannot be collapsed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hubtool.adapters.hypernetwork import ContextAffine, affine, forward, parse
from hubtool.adapters.weight_ops import SwapHalves, TakeCols, TakeRows
from hubtool.errors import CorruptFile, Unsupported, UsageProblem
from hubtool.formats import open_file
from hubtool.layouts.identify import identify
from hubtool.ops import artefacts
from hubtool.ops.artefacts import hypernetwork as ops
from hubtool.ops.execute import execute
from hubtool.ops.plan import Plan
from hubtool.ops.target import Target
from hubtool.tensors.evaluate import compute
from tests.support.tensor_files import tensor
from tests.support.tiny import literal

torch = pytest.importorskip("torch")
nn = torch.nn
WIDTH = 32


def a1111(settings: dict[str, Any], width: int = WIDTH, seed: int = 0) -> Any:
    """``HypernetworkModule.linear`` written out from its description: linear, activation, normalisation, dropout, in that order."""
    torch.manual_seed(seed)
    structure, name = settings["layer_structure"], settings.get("activation_func")
    classes = {"relu": nn.ReLU, "swish": nn.Hardswish, "tanh": nn.Tanh, "leakyrelu": nn.LeakyReLU, "mish": nn.Mish}
    chain: list[Any] = []
    for i in range(len(structure) - 1):
        chain.append(nn.Linear(int(width * structure[i]), int(width * structure[i + 1])))
        last = i >= len(structure) - 2
        if name not in (None, "linear") and not (last and not settings.get("activate_output", True)):
            chain.append(classes[name]())
        if settings.get("is_layer_norm"):
            norm = nn.LayerNorm(int(width * structure[i + 1]))
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            chain.append(norm)
        dropout = settings.get("dropout_structure")
        if dropout and dropout[i + 1] > 0:
            chain.append(nn.Dropout(dropout[i + 1]))
    return nn.Sequential(*chain).eval()


def file_of(
    path: Path, settings: dict[str, Any], widths: tuple[int, ...] = (WIDTH,)
) -> tuple[Path, dict[tuple[int, str], Any]]:
    """A ``.pt`` as A1111 writes it, and its networks."""
    nets = {(w, side): a1111(settings, w, seed=w + i) for w in widths for i, side in enumerate("kv")}
    state = {
        w: tuple({f"linear.{k}": v for k, v in nets[w, side].state_dict().items()} for side in "kv") for w in widths
    }
    torch.save({**state, "step": 1, "name": "x", **settings}, path)
    return path, nets


PLAIN = {"layer_structure": [1, 2, 1], "activation_func": "linear", "activate_output": False}
CASES: dict[str, dict[str, Any]] = {
    "linear": PLAIN,
    "no activation": {"layer_structure": [1, 2, 1], "activation_func": None},
    "deep and linear": {"layer_structure": [1, 0.5, 2, 1], "activation_func": "linear"},
    "one layer": {"layer_structure": [1, 1], "activation_func": "relu", "activate_output": False},
    "relu": {"layer_structure": [1, 2, 1], "activation_func": "relu", "activate_output": False},
    "relu to the end": {"layer_structure": [1, 2, 1], "activation_func": "relu", "activate_output": True},
    "silent about the output": {"layer_structure": [1, 2, 1], "activation_func": "leakyrelu"},
    "swish, normalised, dropped": {
        "layer_structure": [1, 1.5, 2, 1],
        "activation_func": "swish",
        "is_layer_norm": True,
        "use_dropout": True,
        "dropout_structure": [0, 0.3, 0.3, 0],
        "activate_output": True,
    },
    "mish": {"layer_structure": [1, 2, 1], "activation_func": "mish"},
}
AFFINE = ("linear", "no activation", "deep and linear", "one layer")


@pytest.mark.parametrize("case", CASES)
def test_the_formula_is_that_of_the_modules(case: str, tmp_path: Path) -> None:
    path, nets = file_of(tmp_path / "hn.pt", CASES[case])
    found = ops.read(open_file(path))
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))
    for at, network in found.networks.items():
        with torch.no_grad():
            wanted = x + 0.7 * nets[at](x)
        assert torch.allclose(forward(network, x, 0.7), wanted, atol=1e-6)


@pytest.mark.parametrize("case", AFFINE)
def test_an_affine_network_collapses_to_the_same_map(case: str, tmp_path: Path) -> None:
    path, nets = file_of(tmp_path / "hn.pt", CASES[case])
    for at, network in ops.read(open_file(path)).networks.items():
        matrix, offset = affine(network)
        x = torch.randn(5, WIDTH, dtype=torch.float64)
        with torch.no_grad():
            assert torch.allclose(x @ matrix.T + offset, nets[at].double()(x), atol=1e-13)


@pytest.mark.parametrize(
    ("case", "why"), [("relu", "activation is relu"), ("swish, normalised, dropped", "normalises")]
)
def test_what_is_not_affine_is_refused_with_its_reason(case: str, why: str, tmp_path: Path) -> None:
    path, _ = file_of(tmp_path / "hn.pt", CASES[case])
    with pytest.raises(Unsupported, match=why):
        planned(path, layout="linear")
    assert not identify(open_file(path)).findings


def planned(path: Path, **asked: Any) -> Plan:
    file = open_file(path)
    made = artefacts.plan(file, identify(file), Target(**asked))
    assert made is not None
    return made


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_collapsed_file_does_the_same_with_one_layer(suffix: str, tmp_path: Path) -> None:
    path, nets = file_of(tmp_path / "hn.pt", {**CASES["deep and linear"], "use_dropout": True}, (WIDTH, 64))
    made = planned(path, layout="linear", format="safetensors" if suffix == ".safetensors" else "torch-zip")
    assert (made.fidelity, made.losses, len(made.notes)) == ("rounded", (), 1)
    execute(made, tmp_path / f"one{suffix}")
    after = ops.read(open_file(tmp_path / f"one{suffix}"))
    assert {at: len(network.layers) for at, network in after.networks.items()} == dict.fromkeys(nets, 1)
    for at, network in after.networks.items():
        x = torch.randn(3, at[0])
        with torch.no_grad():
            assert torch.allclose(forward(network, x), x + nets[at](x), atol=1e-5)
    assert ops.settings_of(open_file(tmp_path / f"one{suffix}"))["layer_structure"] == [1, 1]


def _hooked(net: Any, _: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0] + 0.5 * net(inputs[0]),)


def test_folding_into_a_u_net_gives_what_hooks_on_its_projections_give(tmp_path: Path) -> None:
    """The oracle wraps to_k and to_v at run time, as the reference does."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    path, nets = file_of(tmp_path / "hn.pt", PLAIN, (24, 32, 64))
    inputs = torch.randn(1, 4, 8, 8), 5, torch.randn(1, 6, 24)
    hooks = [
        module.register_forward_pre_hook(partial(_hooked, nets[module.in_features, name[-1]]))
        for name, module in unet.named_modules()
        if name.endswith(("to_k", "to_v")) and (module.in_features, name[-1]) in nets
    ]
    with torch.no_grad():
        plain_hooked = unet(*inputs).sample
        for hook in hooks:
            hook.remove()
        before = unet(*inputs).sample
        base = {("unet", n): literal(m.weight) for n, m in unet.named_modules() if isinstance(m, nn.Linear)}
        adapter = ops.folded(ops.read(open_file(path)), base, "sd1", 0.5)
        assert len(adapter.patches) == len(hooks) > 4
        for (_, name), patch in adapter.patches.items():
            roles = dict(patch.roles())
            module = unet.get_submodule(name)
            module.weight += compute(roles["diff"])
            module.bias = nn.Parameter(compute(roles["diff_b"]))
        after = unet(*inputs).sample
    assert torch.allclose(after, plain_hooked, atol=2e-5)
    assert (after - before).abs().max() > 1e-3


def test_taking_or_swapping_rows_of_the_projection_leaves_the_change_alone() -> None:
    refs = {"8.0.linear.0.weight": literal(torch.randn(8, 8)), "8.0.linear.0.bias": literal(torch.randn(8))}
    network = _network(refs)
    patch, weight = ContextAffine(network), torch.randn(6, 8)
    for op, cut in ((TakeRows(1, 4), weight[1:4]), (SwapHalves(), weight.roll(3, 0))):
        rows = patch.delta(weight)[1:4] if isinstance(op, TakeRows) else patch.delta(weight).roll(3, 0)
        assert torch.allclose(patch.under(op).delta(cut), rows, atol=1e-6)
    with pytest.raises(Unsupported, match="input"):
        patch.under(TakeCols(0, 2))
    with pytest.raises(Unsupported):
        patch.bias_delta(None)


def _network(parts: dict[str, Any]) -> Any:
    from hubtool.adapters.hypernetwork import Layer, Network

    weight, bias = parts.values()
    return Network(8, "k", (Layer(0, weight, bias),), {})


@pytest.mark.parametrize(
    "shapes",
    [
        {"8.0.linear.0.weight": (16, 8), "8.0.linear.1.weight": (8, 12)},
        {"8.0.linear.0.weight": (16, 8)},
        {"8.0.linear.0.bias": (8,)},
        {"8.0.linear.0.weight": (8, 8), "8.0.linear.0.bias": (4,)},
        {"other": (8, 8)},
    ],
)
def test_layers_that_form_no_chain_are_corrupt(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(CorruptFile):
        parse({name: tensor(name, *shape) for name, shape in shapes.items()}, {})


def test_an_activation_nobody_knows_is_refused_when_it_is_needed(tmp_path: Path) -> None:
    path, _ = file_of(tmp_path / "hn.pt", PLAIN)
    found = parse(open_file(path).tensors, {"activation_func": "nosuch"})
    with pytest.raises(Unsupported, match="nosuch"):
        forward(next(iter(found.networks.values())), torch.zeros(1, WIDTH))
    found = parse(open_file(path).tensors, {"activation_func": "multiheadattention"})
    with pytest.raises(Unsupported, match="needs settings"):
        forward(next(iter(found.networks.values())), torch.zeros(1, WIDTH))


def test_the_fields_come_back_with_their_types_and_order(tmp_path: Path) -> None:
    settings = {
        "layer_structure": [1, 2, 1],
        "activation_func": None,
        "dropout_structure": [0, 0.3, 0],
        "optional_info": "ü",
    }
    path, _ = file_of(tmp_path / "hn.pt", settings)
    execute(planned(path, format="safetensors"), tmp_path / "hn.safetensors")
    file = open_file(tmp_path / "hn.safetensors")
    assert list(json.loads(file.metadata["hubtool.hypernetwork"]).items()) == list(
        {"step": 1, "name": "x", **settings}.items()
    )
    assert next(iter(file.tensors)) == f"hn.{WIDTH}.k.linear.0.weight"
    execute(planned(tmp_path / "hn.safetensors", layout="a1111", format="torch-zip"), tmp_path / "back.pt")
    loaded = torch.load(tmp_path / "back.pt", weights_only=True)
    assert next(type(key) for key in loaded) is int
    assert isinstance(loaded[WIDTH], tuple)
    assert loaded["dropout_structure"] == [0, 0.3, 0]


def test_layouts_belong_in_their_containers(tmp_path: Path) -> None:
    path, _ = file_of(tmp_path / "hn.pt", PLAIN)
    with pytest.raises(UsageProblem, match="another container"):
        planned(path, layout="a1111", format="safetensors")
    with pytest.raises(UsageProblem, match="another container"):
        planned(path, layout="flat", format="torch-zip")
    assert planned(path, layout="a1111").format == "torch-zip"
    assert planned(path, layout="flat").format == "safetensors"
