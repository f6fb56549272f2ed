"""New tokens where diffusers' loader has no place for them: T5, and pipelines without textual inversion (Stable Diffusion 3).

T5's table is longer than its vocabulary (32128 rows for 32100 tokens), so new tokens take those spare rows first: the table never gets
shorter, and the spare rows get their own bits back with the last token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any
from weakref import WeakKeyDictionary

from hubtool.errors import Unsupported
from hubtool.pipelines import live


@dataclass(frozen=True, slots=True)
class _Before:
    """``rows`` of the table and ``known`` tokens before the first new one; ``spare``: the rows of no token."""

    rows: int
    known: int
    spare: Any


_BEFORE: WeakKeyDictionary[Any, _Before] = WeakKeyDictionary()


def served(pipe: Any, encoder: Any) -> bool:
    """Whether diffusers' own loader of textual inversions is made for this encoder of ``pipe``."""
    return hasattr(pipe, "load_textual_inversion") and type(encoder).__name__.startswith("CLIP")


def check(encoder: Any, tokenizer: Any) -> None:
    """Raise ``Unsupported`` for a tokenizer that cannot forget tokens again, or one with more tokens than the table has rows."""
    if not hasattr(tokenizer, "_tokenizer"):
        raise Unsupported(f"{type(tokenizer).__name__} cannot learn tokens: no fast tokenizer")
    rows, known = encoder.get_input_embeddings().num_embeddings, len(tokenizer)
    if rows < known:
        raise Unsupported(f"{type(encoder).__name__} has {rows} rows for {known} tokens")


def add(encoder: Any, tokenizer: Any, names: Sequence[str], vectors: Any) -> None:
    """Teach ``encoder`` the tokens ``names`` with their ``vectors`` (n, width)."""
    import torch

    table, known = encoder.get_input_embeddings(), len(tokenizer)
    spare = table.weight.detach()[known:].clone()
    _BEFORE.setdefault(encoder, _Before(table.num_embeddings, known, spare))
    tokenizer.add_tokens(list(names))
    _resize(encoder, max(table.num_embeddings, len(tokenizer)))
    with torch.no_grad():
        weight = encoder.get_input_embeddings().weight
        weight[tokenizer.convert_tokens_to_ids(list(names))] = vectors.to(weight.device, weight.dtype)


def remove(encoder: Any, tokenizer: Any, names: Collection[str]) -> None:
    """Forget ``names``; other new tokens keep their vectors, and the table its own bits."""
    import torch

    before, weight = _BEFORE[encoder], encoder.get_input_embeddings().weight.detach()
    kept = [name for name in _new(tokenizer, before.known) if name not in names]
    rows = weight[tokenizer.convert_tokens_to_ids(kept)].clone() if kept else weight[:0]
    _forget(tokenizer, names)
    _resize(encoder, max(before.rows, len(tokenizer)))
    tail = torch.cat([rows, before.spare[len(kept) :].to(rows.device, rows.dtype)])
    with torch.no_grad():
        encoder.get_input_embeddings().weight[before.known :] = tail
    if not kept:
        _BEFORE.pop(encoder)


def tables(encoder: Any) -> list[Any]:
    """Every module of ``encoder`` that looks ids up in its table: classes that tie weights have two."""
    from torch import nn

    weight = encoder.get_input_embeddings().weight
    return [one for one in encoder.modules() if isinstance(one, nn.Embedding) and one.weight is weight]


def names_of(token: str, vectors: int) -> tuple[str, ...]:
    """What diffusers calls the tokens of a concept with several vectors: ``token``, ``token_1`` ..."""
    return (token, *(f"{token}_{at}" for at in range(1, vectors)))


def prompts(pipe: Any, text: str, word: str = "prompt") -> dict[str, str]:
    """``text`` as the arguments ``word``, ``word_2`` ... of ``pipe``: with all vectors of its tokens where ``pipe`` does not add them."""
    if hasattr(pipe, "maybe_convert_prompt"):
        return {word: text}
    pairs = live.encoders(pipe).items()
    told = {name.replace("text_encoder", word): spoken(pipe, tokenizer, text) for name, (_, tokenizer) in pairs}
    return {word: text} if set(told.values()) <= {text} else told


def spoken(pipe: Any, tokenizer: Any, prompt: str) -> str:
    """``prompt`` with all vectors of each token written out, for pipelines that do not do so themselves."""
    if hasattr(pipe, "maybe_convert_prompt"):
        return prompt
    known = tokenizer.added_tokens_encoder
    names = sorted((name for name in known if f"{name}_1" in known), key=len, reverse=True)
    pattern = "|".join(map(re.escape, names)) or r"(?!)"
    return re.sub(pattern, lambda found: " ".join(_vectors(found[0], known)), prompt)


def _vectors(name: str, known: Collection[str]) -> Iterator[str]:
    yield name
    further = (f"{name}_{at}" for at in count(1))
    yield from takewhile(lambda one: one in known, further)


def _new(tokenizer: Any, known: int) -> list[str]:
    added = tokenizer.added_tokens_decoder
    return [added[at].content for at in sorted(added) if at >= known]


def _forget(tokenizer: Any, names: Collection[str]) -> None:
    """Tokenizers cannot forget: one is made anew without the names, as diffusers does. Later tokens move up."""
    document = json.loads(tokenizer._tokenizer.to_str())
    gone = sorted(one["id"] for one in document["added_tokens"] if one["content"] in names)
    document["added_tokens"] = [
        {**one, "id": one["id"] - sum(at < one["id"] for at in gone)}
        for one in document["added_tokens"]
        if one["content"] not in names
    ]
    tokenizer._tokenizer = type(tokenizer._tokenizer).from_str(json.dumps(document))


def _resize(encoder: Any, rows: int) -> None:
    table = encoder.get_input_embeddings()
    if table.num_embeddings == rows:
        return
    flag = table.weight.requires_grad
    with live.aside():  # resizing draws random rows, all of which are overwritten
        encoder.resize_token_embeddings(rows, mean_resizing=False)
    encoder.get_input_embeddings().weight.requires_grad_(flag)
