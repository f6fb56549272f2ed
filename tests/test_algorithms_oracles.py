"""Every kind against the libraries that define it: LyCORIS' and PEFT's own modules, what a forward pass makes of them, in fp64.

LyCORIS' merge applies alpha / rank twice to LoHa and LoKr, so its forward pass is the reference, never ``get_merged_weight``.
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
import peft  # noqa: E402
from lycoris import modules  # noqa: E402
from torch import nn  # noqa: E402

from hubtool.adapters import registry  # noqa: E402
from hubtool.adapters.ir import Patch  # noqa: E402
from tests.support.patches import literal  # noqa: E402

# What LyCORIS calls a tensor -> its role here.
ROLES = {
    "lora_up.weight": "up", "lora_down.weight": "down", "lora_mid.weight": "mid", "weight": "ia3",
    "a1.weight": "a1", "a2.weight": "a2", "b1.weight": "b1", "b2.weight": "b2", "bm.weight": "bm",
}  # fmt: skip


def layer(kind: str) -> nn.Module:
    torch.manual_seed(1)
    made = nn.Linear(12, 16) if kind == "linear" else nn.Conv2d(12, 16, 3, padding=1)
    return made.double()


def effect(module: Any, base: nn.Module) -> torch.Tensor:
    """The change of the weight that a forward pass shows: its answer to each unit input, minus the base's.

    A convolution answers a unit input of its kernel's size, at the centre, with that entry of its kernel.
    """
    shape = base.weight.shape
    basis = torch.eye(shape[1:].numel(), dtype=base.weight.dtype).reshape(-1, *shape[1:])
    change = module(basis) - base(basis)
    return change.T if isinstance(base, nn.Linear) else change[..., 1, 1].T.reshape(shape)


def randomised(module: nn.Module) -> dict[str, torch.Tensor]:
    """Random numbers in every factor; what a file would hold."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter if parameter.ndim == 0 else 0))
            parameter.copy_(parameter.float())  # what fp32 holds, so that both sides read the same numbers
    return {key: value for key, value in module.state_dict().items() if key != "scalar"}


def ours(algorithm: str, state: dict[str, torch.Tensor], **facts: Any) -> Patch:
    tensors = {ROLES.get(key, key): literal(value.float()) for key, value in state.items() if key != "on_input"}
    if "on_input" in state:
        tensors["on_input"] = literal(state["on_input"])
    alpha = float(state["alpha"]) if "alpha" in state else None
    patch = registry.make(algorithm, tensors, alpha, **facts)
    patch.check("the module")
    return patch


def agree(patch: Patch, base: nn.Module, want: torch.Tensor) -> None:
    want = want.detach().double()
    largest = float(want.abs().max())
    assert largest > 1e-3
    assert torch.allclose(patch.delta(base.weight.detach()).double(), want, atol=1e-5 * max(largest, 0.2))


LORA = {"lora_dim": 3, "alpha": 2.0}
LYCORIS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "lora": ("LoConModule", "lora", "linear", LORA),
    "locon": ("LoConModule", "lora", "conv", LORA),
    "tucker": ("LoConModule", "lora", "conv", LORA | {"use_tucker": True}),
    "rs-lora, baked into alpha": ("LoConModule", "lora", "linear", LORA | {"rs_lora": True}),
    "dora per output": ("LoConModule", "lora", "linear", LORA | {"weight_decompose": True}),
    "dora per input": ("LoConModule", "lora", "linear", LORA | {"weight_decompose": True, "wd_on_out": False}),
    "dora of a convolution, per output": ("LoConModule", "lora", "conv", LORA | {"weight_decompose": True}),
    "dora of a convolution, per input": (
        "LoConModule", "lora", "conv", LORA | {"weight_decompose": True, "wd_on_out": False},
    ),
    "loha": ("LohaModule", "loha", "linear", LORA),
    "loha of a convolution": ("LohaModule", "loha", "conv", LORA),
    "loha, tucker": ("LohaModule", "loha", "conv", LORA | {"use_tucker": True}),
    "loha, dora per output": ("LohaModule", "loha", "linear", LORA | {"weight_decompose": True}),
    "loha, dora per input": ("LohaModule", "loha", "linear", LORA | {"weight_decompose": True, "wd_on_out": False}),
    "loha of a convolution, dora per input": (
        "LohaModule", "loha", "conv", LORA | {"weight_decompose": True, "wd_on_out": False},
    ),
    "lokr": ("LokrModule", "lokr", "linear", {"lora_dim": 1, "alpha": 3.0, "factor": 4}),
    "lokr, both decomposed": ("LokrModule", "lokr", "linear", {"lora_dim": 1, "alpha": 3.0, "factor": 4, "decompose_both": True}),
    "lokr, full matrices": ("LokrModule", "lokr", "linear", {"lora_dim": 9, "alpha": 3.0, "factor": 4, "full_matrix": True}),
    "lokr of a convolution": ("LokrModule", "lokr", "conv", {"lora_dim": 1, "alpha": 3.0, "factor": 4}),
    "lokr, tucker": ("LokrModule", "lokr", "conv", {"lora_dim": 1, "alpha": 3.0, "factor": 4, "use_tucker": True}),
    "lokr of a convolution, full": ("LokrModule", "lokr", "conv", {"lora_dim": 9, "alpha": 3.0, "factor": 4, "full_matrix": True}),
    "lokr, dora per output": ("LokrModule", "lokr", "linear", {"lora_dim": 1, "alpha": 3.0, "factor": 4, "weight_decompose": True}),
    "lokr, dora per input": (
        "LokrModule", "lokr", "linear", {"lora_dim": 1, "alpha": 3.0, "factor": 4, "weight_decompose": True, "wd_on_out": False},
    ),
    "oft": ("DiagOFTModule", "oft", "linear", {"lora_dim": 4}),
    "oft of a convolution": ("DiagOFTModule", "oft", "conv", {"lora_dim": 4}),
    "oft, constrained": ("DiagOFTModule", "oft", "linear", {"lora_dim": 4, "constraint": 0.05}),
    "oft, rescaled": ("DiagOFTModule", "oft", "conv", {"lora_dim": 4, "rescaled": True}),
    "boft": ("ButterflyOFTModule", "oft", "linear", {"lora_dim": 4}),
    "boft of a convolution, rescaled": ("ButterflyOFTModule", "oft", "conv", {"lora_dim": 4, "rescaled": True}),
    "boft, constrained": ("ButterflyOFTModule", "oft", "linear", {"lora_dim": 4, "constraint": 0.05}),
    "glora": ("GLoRAModule", "glora", "linear", LORA),
    "glora of a convolution": ("GLoRAModule", "glora", "conv", LORA),
    "ia3": ("IA3Module", "ia3", "linear", {}),
    "ia3 on inputs": ("IA3Module", "ia3", "linear", {"train_on_input": True}),
    "ia3 of a convolution": ("IA3Module", "ia3", "conv", {}),
    "ia3 of a convolution on inputs": ("IA3Module", "ia3", "conv", {"train_on_input": True}),
    "full": ("FullModule", "full", "conv", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", LYCORIS)
def test_a_kind_changes_the_weight_as_lycoris_does(case: str) -> None:
    name, algorithm, kind, options = LYCORIS[case]
    base = layer(kind) if algorithm != "oft" else layer(kind).float()  # LyCORIS inverts in fp32 and nothing else
    module = getattr(modules, name)("m", base, **options).to(base.weight.dtype)
    state = randomised(module)
    want = effect(module, base) if name != "FullModule" else state["diff"]
    agree(ours(algorithm, state), base, want)


def test_a_norm_is_added_as_lycoris_does() -> None:
    base = nn.LayerNorm(16).double()
    module = modules.NormModule("m", base).double()
    state = randomised(module)
    patch = ours("norm", state)
    x = torch.randn(5, 16, dtype=torch.float64)
    change = nn.functional.layer_norm(x, (16,)) * patch.delta() + patch.bias_delta()
    assert torch.allclose(base(x) + change, module(x), atol=1e-5)


def sd_scripts_rotation(blocks: torch.Tensor, alpha: float, weight: torch.Tensor) -> torch.Tensor:
    """networks/oft.py's rule, written out: ||Q|| over all blocks clamped to alpha * rows, W' = R^T W per block."""
    q = blocks - blocks.transpose(1, 2)
    norm = q.flatten().norm()
    q = q * ((norm.clamp(max=alpha * len(weight)) + 1e-8) / (norm + 1e-8))
    eye = torch.eye(blocks.shape[1], dtype=blocks.dtype)
    rotation = torch.block_diag(*((eye + one) @ (eye - one).inverse() for one in q))
    return (rotation.T @ weight.flatten(1)).reshape(weight.shape)


@pytest.mark.parametrize("alpha", [0.001, 0.05, 10.0])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_oft_of_sd_scripts_is_clamped_by_its_alpha(alpha: float, kind: str) -> None:
    base = layer(kind)
    blocks = torch.randn(4, 4, 4, dtype=torch.float64).float().double()
    patch = ours("oft", {"oft_blocks": blocks, "alpha": torch.tensor(alpha)}, flavour="kohya")
    want = sd_scripts_rotation(blocks, alpha, base.weight) - base.weight
    assert torch.allclose(patch.delta(base.weight.detach()).double(), want, atol=3e-6)


def test_alpha_zero_means_identity_to_sd_scripts_and_freedom_to_lycoris() -> None:
    base, blocks = layer("linear"), {"oft_blocks": torch.randn(4, 4, 4), "alpha": torch.tensor(0.0)}
    weight = base.weight.detach()
    assert float(ours("oft", blocks, flavour="kohya").delta(weight).abs().max()) < 1e-6
    assert float(ours("oft", blocks).delta(weight).abs().max()) > 0.01


def test_early_oft_of_peft_pads_its_last_block() -> None:
    base, blocks = layer("linear"), torch.randn(3, 6, 6)
    skew = 0.5 * (blocks - blocks.transpose(1, 2)).double()
    eye = torch.eye(6, dtype=torch.float64)
    whole = torch.block_diag(*((eye - one) @ (eye + one).inverse() for one in skew))[:16, :16]
    want = (base.weight.T @ whole).T - base.weight
    agree(ours("oft", {"oft_r": blocks}), base, want)


def peft_layer(kind: str, **config: Any) -> Any:
    """A PEFT layer around a linear or convolution layer, its factors random."""
    net = nn.ModuleDict({"proj": layer(kind)})
    model = peft.get_peft_model(net, getattr(peft, config.pop("config"))(target_modules=["proj"], **config))
    wrapped = model.base_model.model["proj"].double()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.copy_((0.2 * torch.randn_like(parameter) + ("ia3" in name or "boft_s" in name)).float())
    return wrapped


def peft_state(wrapped: Any) -> dict[str, torch.Tensor]:
    """Role -> tensor, as PEFT saves them (the adapter's name dropped)."""
    names = {"lora_A": "down", "lora_B": "up", "lora_magnitude_vector": "dora_scale"}
    state = {}
    for name, parameter in wrapped.named_parameters():
        head = name.split(".", 1)[0]
        if parameter.requires_grad:
            role = names.get(head, head)
            state["bias" if name.endswith("lora_B.default.bias") else role] = parameter.detach()
    return state


PEFT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("linear", "lora", {"config": "LoraConfig", "r": 3, "lora_alpha": 2}),
    "locon": ("conv", "lora", {"config": "LoraConfig", "r": 3, "lora_alpha": 2}),
    "dora": ("linear", "lora", {"config": "LoraConfig", "r": 3, "lora_alpha": 2, "use_dora": True}),
    "dora of a convolution": ("conv", "lora", {"config": "LoraConfig", "r": 3, "lora_alpha": 2, "use_dora": True}),
    "loha": ("linear", "loha", {"config": "LoHaConfig", "r": 3, "alpha": 2}),
    "loha, tucker": ("conv", "loha", {"config": "LoHaConfig", "r": 3, "alpha": 2, "use_effective_conv2d": True}),
    "lokr": ("linear", "lokr", {"config": "LoKrConfig", "r": 1, "alpha": 2, "decompose_both": True}),
    "lokr, tucker": ("conv", "lokr", {"config": "LoKrConfig", "r": 1, "alpha": 2, "use_effective_conv2d": True}),
    "oft": ("linear", "oft", {"config": "OFTConfig", "oft_block_size": 4}),
    "oft, exact": ("linear", "oft", {"config": "OFTConfig", "oft_block_size": 4, "use_cayley_neumann": False}),
    "oft, one block for all": ("linear", "oft", {"config": "OFTConfig", "oft_block_size": 4, "block_share": True}),
    "oft of a convolution": ("conv", "oft", {"config": "OFTConfig", "oft_block_size": 4}),
    "boft": ("linear", "boft", {"config": "BOFTConfig", "boft_block_size": 4}),
    "boft of a convolution": ("conv", "boft", {"config": "BOFTConfig", "boft_block_size": 4}),
    "ia3": ("linear", "ia3", {"config": "IA3Config", "feedforward_modules": []}),
    "ia3 on inputs": ("linear", "ia3", {"config": "IA3Config", "feedforward_modules": ["proj"]}),
    "ia3 of a convolution": ("conv", "ia3", {"config": "IA3Config", "feedforward_modules": []}),
    "ia3 of a convolution on inputs": ("conv", "ia3", {"config": "IA3Config", "feedforward_modules": ["proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", PEFT)
@pytest.mark.filterwarnings("ignore")
def test_a_kind_changes_the_weight_as_peft_does(case: str) -> None:
    kind, algorithm, config = PEFT[case]
    base, wrapped = layer(kind), peft_layer(kind, **config)
    state = peft_state(wrapped)
    alpha = config.get("lora_alpha", config.get("alpha"))
    if alpha is not None:
        state["alpha"] = torch.tensor(float(alpha))
    patch = ours(algorithm, state)
    if config.get("use_cayley_neumann") is False:
        patch = replace_terms(patch)
    wrapped.merge()
    agree(patch, base, wrapped.get_base_layer().weight - base.weight)
    change = patch.bias_delta(base.bias.detach())
    want = wrapped.get_base_layer().bias - base.bias
    assert torch.allclose(torch.zeros(16) if change is None else change, want.detach().float(), atol=1e-5)


def replace_terms(patch: Any) -> Patch:
    from dataclasses import replace

    return replace(patch, terms=None)


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 7])
def test_the_neumann_series_is_as_long_as_pefts(terms: int) -> None:
    from dataclasses import replace

    from peft.tuners.oft.layer import OFTRotationModule

    rotation = OFTRotationModule(3, 6, 4, 12, num_cayley_neumann_terms=terms)
    triangle = 0.3 * torch.randn(3, 6)
    matrix = torch.block_diag(*rotation._cayley_batch(triangle, 4, True, terms))
    weight = torch.randn(16, 12)
    patch = replace(ours("oft", {"oft_R": triangle}), terms=terms)  # type: ignore[type-var]
    assert torch.allclose(patch.delta(weight), (matrix @ weight.T).T - weight, atol=1e-5)


def test_butterfly_stages_follow_pefts_permutations() -> None:
    from peft.tuners.boft.layer import BOFTLayer

    stages, blocks, size, width = 3, 4, 4, 16
    r, s = 0.3 * torch.randn(stages, blocks, size, size), torch.rand(16, 1) + 0.5
    whole, shell = torch.eye(width), BOFTLayer.__new__(BOFTLayer)
    for i in range(stages):
        order = BOFTLayer.block_butterfly_perm(shell, width, blocks // 2**i, size // 2, stages - 1)
        p = BOFTLayer.perm2mat(shell, order)
        whole = p @ torch.block_diag(*BOFTLayer.cayley_batch(shell, r[i])) @ p.T @ whole
    weight = torch.randn(16, width)
    want = (whole @ weight.T).T * s - weight
    assert torch.allclose(ours("boft", {"boft_R": r, "boft_s": s}).delta(weight), want, atol=1e-5)


def test_scaled_oft_divides_its_generator() -> None:
    """OneTrainer: Q / (2 sqrt(n - 1)), then PEFT's series; DoRA-OFT: rows times dora_scale / initial_norm."""
    triangle, weight = torch.randn(3, 6), torch.randn(16, 12)
    plain = ours("oft", {"oft_R": triangle / (2 * 3**0.5)}).delta(weight)
    flags = {"oft_R": triangle, "scaled_oft": torch.tensor(1.0)}
    assert torch.allclose(ours("oft", flags).delta(weight), plain, atol=1e-6)
    scales = {"dora_scale": torch.rand(16, 1) + 1, "initial_norm": torch.rand(16, 1) + 1}
    want = (weight + plain) * scales["dora_scale"] / scales["initial_norm"] - weight
    assert torch.allclose(ours("oft", flags | scales).delta(weight), want, atol=1e-5)


def test_an_embedding_is_changed_as_peft_does() -> None:
    net = nn.ModuleDict({"proj": nn.Embedding(16, 12)})
    config = peft.LoraConfig(target_modules=["proj"], r=3, lora_alpha=2)
    wrapped = peft.get_peft_model(net, config).base_model.model["proj"]
    with torch.no_grad():
        for parameter in (*wrapped.lora_embedding_A.values(), *wrapped.lora_embedding_B.values()):
            parameter.copy_(torch.randn_like(parameter))
    state = {
        "embedding_A": wrapped.lora_embedding_A["default"].detach(),
        "embedding_B": wrapped.lora_embedding_B["default"].detach(),
        "alpha": torch.tensor(2.0),
    }
    patch = ours("lora", state)
    assert torch.allclose(patch.delta(), wrapped.get_delta_weight("default"), atol=1e-5)
    assert [role for role, _ in patch.roles()] == ["alpha", "embedding_B", "embedding_A"]


def test_old_glora_holds_its_pairs_the_other_way_round() -> None:
    a1, a2, b1, b2 = (torch.randn(3, 12), torch.randn(12, 3), torch.randn(3, 12), torch.randn(16, 3))
    weight = torch.randn(16, 12)
    old = ours("glora", {"a1": a1, "a2": a2, "b1": b1, "b2": b2, "alpha": torch.tensor(1.5)})
    assert torch.allclose(old.delta(weight), 0.5 * (b2 @ b1 + weight @ a2 @ a1), atol=1e-5)


def test_a_lokr_of_march_2023_splits_the_flattened_kernel() -> None:
    w1, w2 = torch.randn(4, 12), torch.randn(4, 9)
    weight = torch.randn(16, 12, 3, 3)
    want = torch.kron(w1, w2).reshape(weight.shape)
    assert torch.allclose(ours("lokr", {"lokr_w1": w1, "lokr_w2": w2}).delta(weight), want, atol=1e-6)


def test_a_full_matrix_lokr_ignores_the_alpha_that_trainers_write() -> None:
    state = {"lokr_w1": torch.randn(4, 3), "lokr_w2": torch.randn(4, 4), "alpha": torch.tensor(9999999999.0)}
    patch = ours("lokr", state)
    assert patch.scale == 1.0
    assert torch.allclose(patch.delta(), torch.kron(state["lokr_w1"], state["lokr_w2"]))


def test_a_sparse_residual_changes_the_weight() -> None:
    dense = torch.zeros(16, 12)
    dense[[0, 5, 15], [1, 11, 7]] = torch.tensor([1.0, -2.0, 3.0])
    sparse = dense.to_sparse().coalesce()
    tensors = {
        "bias_indices": literal(sparse.indices().to(torch.int16)),
        "bias_values": literal(sparse.values()),
        "bias_size": literal(torch.tensor(dense.shape, dtype=torch.int16)),
    }
    up, down = torch.randn(16, 3), torch.randn(3, 12)
    patch = registry.make("lora", {"up": literal(up), "down": literal(down), **tensors}, 3.0)
    assert torch.allclose(patch.delta(), up @ down + dense, atol=1e-5)
    assert torch.equal(registry.make("sparse", tensors).delta(), dense)


def test_a_replaced_weight_is_the_value_minus_the_base() -> None:
    value, weight = torch.randn(16, 12), torch.randn(16, 12)
    assert torch.equal(ours("set", {"set_weight": value}).delta(weight), value - weight)
