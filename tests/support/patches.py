"""One small patch of every kind and spelling, with the shape of the base weight it changes, and the operations written out as an oracle."""

from __future__ import annotations

import struct
from typing import Any

import torch

from hubtool.adapters import registry
from hubtool.adapters.ir import Patch
from hubtool.adapters.weight_ops import ReshapeWeight, SwapHalves, TakeCols, TakeRows, Transpose, WeightOp
from hubtool.tensors.expr import Literal
from hubtool.types import Shape
from tests.support.adapters import scalar, values

OUT, IN, K = 16, 8, (3, 3)
LINEAR: Shape = (OUT, IN)
CONV: Shape = (OUT, IN, *K)


def apply(op: WeightOp, weight: torch.Tensor) -> torch.Tensor:
    """The operation on a plain weight."""
    match op:
        case TakeRows(start, stop):
            return weight[start:stop]
        case TakeCols(start, stop):
            return weight[:, start:stop]
        case SwapHalves():
            return torch.cat([weight[len(weight) // 2 :], weight[: len(weight) // 2]])
        case Transpose():
            return weight.T
        case ReshapeWeight(shape):
            return weight.reshape(shape)


def literal(tensor: torch.Tensor) -> Literal:
    """A tensor as an expression: F32 for floats, I64 and I16 as they are."""
    if tensor.dtype in (torch.int16, torch.int64):
        code, dtype = ("h", "I16") if tensor.dtype == torch.int16 else ("q", "I64")
    else:
        code, dtype = "f", "F32"
    numbers = tensor.flatten().tolist()
    return Literal(struct.pack(f"<{len(numbers)}{code}", *numbers), dtype, tuple(tensor.shape))


def patch(algorithm: str, shapes: dict[str, Shape], seed: int = 0, alpha: float | None = None, **more: Any) -> Patch:
    """Random factors. ``more``: roles whose values matter, as expressions, or ``flavour``."""
    flavour = more.pop("flavour", None)
    tensors = {role: values(shape, seed + i) for i, (role, shape) in enumerate(shapes.items())} | more
    if alpha is not None:
        tensors["alpha"] = scalar(alpha)
    made = registry.make(algorithm, tensors, alpha, flavour=flavour)
    made.check("the module")
    return made


def shaped(made: Patch, shape: Shape) -> Patch:
    """The patch told what its weight looks like, for kinds whose factors flatten a convolution."""
    return made.under(ReshapeWeight(shape))


def _lora(**more: Any) -> Patch:
    return patch("lora", {"up": (OUT, 3), "down": (3, IN)} | more.pop("shapes", {}), alpha=2.0, **more)


def _loha(inner: int = IN, **shapes: Shape) -> Patch:
    plain = {"hada_w1_a": (OUT, 3), "hada_w1_b": (3, inner), "hada_w2_a": (OUT, 3), "hada_w2_b": (3, inner)}
    return patch("loha", plain | shapes, alpha=1.5)


def _lokr(alpha: float | None = 1.0, **shapes: Shape) -> Patch:
    return patch("lokr", {f"lokr_{role}": shape for role, shape in shapes.items() if role != "dora_scale"}
                 | {role: shape for role, shape in shapes.items() if role == "dora_scale"}, alpha=alpha)  # fmt: skip


def _oft(shape: Shape = (4, 4, 4), alpha: float | None = 0.0, **more: Any) -> Patch:
    return patch("oft", {"oft_blocks": shape} | more.pop("shapes", {}), alpha=alpha, **more)


_SPARSE = {
    "bias_indices": literal(torch.tensor([[0, 5, 15, 5], [1, 2, 7, 2]], dtype=torch.int16)),
    "bias_values": values((4,), 9),
    "bias_size": literal(torch.tensor([OUT, IN], dtype=torch.int16)),
}

CASES: dict[str, tuple[Patch, Shape]] = {
    "lora": (_lora(), LINEAR),
    "lora with bias": (_lora(shapes={"bias": (OUT,), "diff_b": (OUT,)}), LINEAR),
    "lora with a sparse residual": (_lora(**_SPARSE), LINEAR),
    "locon": (patch("lora", {"up": (OUT, 3, 1, 1), "down": (3, *CONV[1:])}, alpha=2.0), CONV),
    "tucker": (patch("lora", {"up": (OUT, 3, 1, 1), "mid": (3, 3, *K), "down": (3, IN, 1, 1)}, alpha=2.0), CONV),
    "dora per output": (_lora(shapes={"dora_scale": (OUT, 1)}), LINEAR),
    "dora per output, flat": (_lora(shapes={"dora_scale": (OUT,)}), LINEAR),
    "dora per input": (_lora(shapes={"dora_scale": (1, IN)}), LINEAR),
    "embedding": (patch("lora", {"embedding_A": (3, OUT), "embedding_B": (IN, 3)}, alpha=2.0), LINEAR),
    "loha": (_loha(), LINEAR),
    "loha of a convolution": (shaped(_loha(IN * 9), CONV), CONV),
    "loha, tucker": (
        _loha(hada_w1_a=(3, OUT), hada_w1_b=(3, IN), hada_t1=(3, 3, *K), hada_w2_a=(3, OUT), hada_w2_b=(3, IN), hada_t2=(3, 3, *K)),
        CONV,
    ),
    "loha, dora per output": (_loha(dora_scale=(OUT, 1)), LINEAR),
    "loha, dora per input": (_loha(dora_scale=(1, IN)), LINEAR),
    "lokr, full": (_lokr(w1=(4, 2), w2=(4, 4)), LINEAR),
    "lokr, w2 decomposed": (_lokr(w1=(4, 2), w2_a=(4, 2), w2_b=(2, 4)), LINEAR),
    "lokr, w1 decomposed": (_lokr(w1_a=(4, 2), w1_b=(2, 2), w2=(4, 4)), LINEAR),
    "lokr, both decomposed": (_lokr(w1_a=(4, 2), w1_b=(2, 2), w2_a=(4, 2), w2_b=(2, 4)), LINEAR),
    "lokr, one row": (_lokr(w1=(1, 2), w2_a=(16, 2), w2_b=(2, 4)), LINEAR),
    "lokr of a convolution": (_lokr(w1=(4, 2), w2=(4, 4, *K)), CONV),
    "lokr of a convolution, decomposed": (shaped(_lokr(w1=(4, 2), w2_a=(4, 2), w2_b=(2, 36)), CONV), CONV),
    "lokr, early": (shaped(_lokr(w1_a=(4, 2), w1_b=(2, 12), w2_a=(4, 2), w2_b=(2, 6)), CONV), CONV),
    "lokr, tucker": (_lokr(w1=(4, 2), w2_a=(2, 4), w2_b=(2, 4), t2=(2, 2, *K)), CONV),
    "lokr, dora per output": (_lokr(w1=(4, 2), w2=(4, 4), dora_scale=(OUT, 1)), LINEAR),
    "lokr, dora per input": (_lokr(w1=(4, 2), w2=(4, 4), dora_scale=(1, IN)), LINEAR),
    "oft": (_oft(), LINEAR),
    "oft of a convolution": (_oft(), CONV),
    "oft, rescaled": (_oft(shapes={"rescale": (OUT, 1), "diff_b": (OUT,)}), LINEAR),
    "oft, constrained": (_oft(alpha=0.05), LINEAR),
    "oft of sd-scripts": (_oft(alpha=0.05, flavour="kohya"), LINEAR),
    "oft of sd-scripts, alpha 0": (_oft(alpha=0.0, flavour="kohya"), LINEAR),
    "boft": (_oft((2, 4, 4, 4)), LINEAR),
    "boft, every stage": (_oft((3, 4, 4, 4)), LINEAR),
    "oft of early peft": (patch("oft", {"oft_r": (3, 6, 6)}), LINEAR),
    "oft of peft": (patch("oft", {"oft_R": (2, 6)}), LINEAR),
    "oft of peft, shared": (patch("oft", {"oft_R": (1, 6)}), LINEAR),
    "oft of onetrainer": (
        patch("oft", {"oft_R": (2, 6), "dora_scale": (OUT, 1), "initial_norm": (OUT, 1)}, scaled_oft=scalar(1.0)), LINEAR,
    ),
    "boft of peft": (patch("boft", {"boft_R": (1, 2, 4, 4), "boft_s": (OUT, 1)}), LINEAR),
    "glora": (patch("glora", {"a1": (IN, 3), "a2": (3, IN), "b1": (OUT, 3), "b2": (3, IN)}, alpha=2.0), LINEAR),
    "glora, old order": (patch("glora", {"a1": (3, IN), "a2": (IN, 3), "b1": (3, IN), "b2": (OUT, 3)}, alpha=2.0), LINEAR),
    "glora of a convolution": (
        patch("glora", {"a1": (IN, 3, 1, 1), "a2": (3, IN, 1, 1), "b1": (OUT, 3, 1, 1), "b2": (3, *CONV[1:])}), CONV,
    ),
    "full": (patch("full", {"diff": LINEAR}), LINEAR),
    "full with bias": (patch("full", {"diff": CONV, "diff_b": (OUT,)}), CONV),
    "bias alone": (patch("full", {"diff_b": (OUT,)}), LINEAR),
    "norm": (patch("norm", {"w_norm": (OUT,), "b_norm": (OUT,)}), (OUT,)),
    "set": (patch("set", {"set_weight": LINEAR}), LINEAR),
    "sparse": (patch("sparse", {}, **_SPARSE), LINEAR),
    "ia3 on outputs": (patch("ia3", {"ia3": (OUT,)}, on_input=literal(torch.tensor(0))), LINEAR),
    "ia3 on inputs": (patch("ia3", {"ia3": (1, IN, 1, 1)}, on_input=literal(torch.tensor(1))), CONV),
    "ia3 of peft on outputs": (patch("ia3", {"ia3_l": (OUT, 1)}), LINEAR),
    "ia3 of peft on inputs": (patch("ia3", {"ia3_l": (1, IN)}), LINEAR),
}  # fmt: skip


def base(shape: Shape, seed: int = 100) -> torch.Tensor:
    """A base weight."""
    return torch.tensor(struct.unpack(f"<{torch.Size(shape).numel()}f", values(shape, seed).data)).reshape(shape)
