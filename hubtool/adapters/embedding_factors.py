"""PEFT's low-rank factors of an embedding: kept turned over, since the weight (tokens, dim) is looked up, not multiplied.

``lora_embedding_A`` (rank, tokens), ``lora_embedding_B`` (dim, rank); delta = scale * (B @ A).T. Source: PEFT tuners/lora/layer.py.
"""

from __future__ import annotations

from typing import Any

from hubtool.adapters.low_rank import LowRank
from hubtool.adapters.parts import require, transpose
from hubtool.tensors.expr import Expr


def of_embedding(embedding_A: Expr, embedding_B: Expr, **rest: Any) -> LowRank:  # noqa: N803 (PEFT's own names)
    """The factors as ``LowRank`` of the weight. Raises ``CorruptFile`` for factors that are no matrices."""
    shapes = embedding_A.shape, embedding_B.shape
    require(
        all(len(shape) == 2 for shape in shapes), f"factors of an embedding have the shapes {shapes[0]} and {shapes[1]}"
    )
    return LowRank(up=transpose(embedding_A), down=transpose(embedding_B), embedding=True, **rest)


PATCH = of_embedding
