"""Textual inversion in a live pipeline: new tokens with their vectors, in every text encoder that has vectors of that width.

Pitfalls of diffusers 0.42 with transformers 5 that are met here: mixed-case tokens of several vectors are never expanded (the
tokenizer lower-cases them); a published ``eos_token_id`` of 2 takes the pooled output from the new token; removing tokens leaves
``config.vocab_size`` behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from hubtool.adapters.ir import Adapter, Embedding
from hubtool.errors import BadValues, LoadMismatch, ShapeMismatch, Unsupported, UsageProblem
from hubtool.pipelines import live, token_tables
from hubtool.tensors.evaluate import compute
from hubtool.types import Finding

Tokens = dict[str, tuple[str, ...]]
_LEGACY_EOS = 2  # transformers pull request 24773: with this id, CLIP pools at the highest id of the prompt


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """``vectors`` (n, dim) that ``encoder`` learns as ``token``; n > 1 takes the tokens ``token``, ``token_1``, ..."""

    encoder: str
    token: str
    vectors: Any

    def names(self) -> tuple[str, ...]:
        return token_tables.names_of(self.token, len(self.vectors))


def plan_tokens(
    pipe: Any, adapter: Adapter, token: str | Sequence[str] | None
) -> tuple[list[TokenPlan], list[Finding]]:
    """Work out which encoder learns what. ``token`` overrides the file's own names, one for each.

    Raises ``UsageProblem`` for a token that is missing or taken, ``ShapeMismatch`` where no encoder has the vectors' width,
    ``BadValues`` for NaN and infinity, ``Unsupported`` for a pipeline without text encoders.
    """
    if not adapter.embeddings:
        return [], []
    if not live.encoders(pipe):
        raise Unsupported(f"{type(pipe).__name__} has no text encoder with a tokenizer that could learn a token")
    names = _names(adapter.embeddings, token)
    plans, findings = [], []
    for embedding in adapter.embeddings:
        encoder = _encoder(pipe, embedding)
        name, finding = _spelled(live.encoders(pipe)[encoder][1], names[embedding.token])
        plans.append(TokenPlan(encoder, name, _vectors(live.encoders(pipe)[encoder][0], embedding)))
        findings += finding
    _check_free(pipe, plans)
    return plans, list(dict.fromkeys([*findings, *_unserved(pipe, plans)]))


def load_tokens(pipe: Any, plans: list[TokenPlan]) -> Tokens:
    """Add the planned tokens; return the names added to each encoder. Raises ``LoadMismatch`` after taking everything back."""
    added: dict[str, tuple[str, ...]] = {}
    with ExitStack() as undo:
        undo.callback(unload_tokens, pipe, added)
        for one in plans:
            encoder, tokenizer = live.encoders(pipe)[one.encoder]
            _add(pipe, one)
            added[one.encoder] = (*added.get(one.encoder, ()), *one.names())
            _verify(encoder, tokenizer, one)
            _point_at_eos(encoder, tokenizer)
        undo.pop_all()
    return added


def unload_tokens(pipe: Any, added: Tokens) -> None:
    """Remove tokens and their rows; the rows that stay keep their bits, the tokens that stay keep their vectors."""
    for component, names in added.items():
        encoder, tokenizer = live.encoders(pipe)[component]
        if not token_tables.served(pipe, encoder):
            token_tables.remove(encoder, tokenizer, names)
            _restore_eos(encoder, tokenizer)
            continue
        flag = encoder.get_input_embeddings().weight.requires_grad
        with live.aside():
            pipe.unload_textual_inversion(list(names), tokenizer=tokenizer, text_encoder=encoder)
        table = encoder.get_input_embeddings()
        table.weight.data = table.weight.data.clone()  # diffusers leaves a view of the longer table
        table.weight.requires_grad_(flag)
        encoder.config.vocab_size = table.num_embeddings
        _restore_eos(encoder, tokenizer)


def _names(embeddings: Sequence[Embedding], token: str | Sequence[str] | None) -> dict[str | None, str]:
    """The file's token -> the token to use."""
    own = list(dict.fromkeys(embedding.token for embedding in embeddings))
    wanted: Sequence[str | None] = own if token is None else [token] if isinstance(token, str) else list(token)
    if len(wanted) != len(own):
        raise UsageProblem(f"the file has {len(own)} tokens ({', '.join(map(str, own))}), token= names {len(wanted)}")
    named = {mine: (theirs or "").strip() for mine, theirs in zip(own, wanted, strict=True)}
    if not all(named.values()):
        raise UsageProblem(
            "the file does not say which token its vectors belong to", hint="name it: token='<my-token>'"
        )
    return named


def _encoder(pipe: Any, embedding: Embedding) -> str:
    width = embedding.vectors.shape[-1]
    widths = {name: encoder.get_input_embeddings().embedding_dim for name, (encoder, _) in live.encoders(pipe).items()}
    fitting = [name for name, own in widths.items() if own == width]
    if embedding.encoder in fitting:
        return str(embedding.encoder)
    if len(fitting) != 1:
        have = ", ".join(f"{name} {own}" for name, own in widths.items())
        raise ShapeMismatch(f"vectors of {embedding.token} are {width} wide; the encoders of this pipeline: {have}")
    return fitting[0]


def _spelled(tokenizer: Any, token: str) -> tuple[str, list[Finding]]:
    """The token as the tokenizer will see it in a prompt, with what the user must know to write that prompt."""
    findings = []
    if tokenizer.tokenize("A") == tokenizer.tokenize("a") and token != token.lower():
        message = f"this tokenizer has no upper case: write {token.lower()} in prompts, not {token}"
        findings.append(Finding("token-lower-cased", "warning", message))
        token = token.lower()
    if token.isalnum():
        message = f"the token {token} is also found inside longer words; <{token}> would not be"
        findings.append(Finding("token-inside-words", "info", message))
    return token, findings


def _vectors(encoder: Any, embedding: Embedding) -> Any:
    width = embedding.vectors.shape[-1]
    vectors = compute(embedding.vectors).to(encoder.get_input_embeddings().weight.dtype).reshape(-1, width).clone()
    if not len(vectors) or not bool(vectors.isfinite().all()):
        raise BadValues(f"the vectors of {embedding.token} are empty, or hold NaN or infinity")
    return vectors


def _check_free(pipe: Any, plans: list[TokenPlan]) -> None:
    taken = {name: set(tokenizer.get_vocab()) for name, (_, tokenizer) in live.encoders(pipe).items()}
    for one in plans:
        encoder, tokenizer = live.encoders(pipe)[one.encoder]
        clash = taken[one.encoder].intersection([*one.names(), f"{one.token}_1"])
        if clash:
            raise UsageProblem(f"{one.encoder} knows the token {min(clash)} already", hint="choose another with token=")
        taken[one.encoder].update(one.names())
        if not token_tables.served(pipe, encoder):
            token_tables.check(encoder, tokenizer)
            continue
        rows, known = encoder.get_input_embeddings().num_embeddings, len(tokenizer)
        if rows != known:
            raise Unsupported(f"{one.encoder} has {rows} rows for {known} tokens; diffusers would cut its table")


def _unserved(pipe: Any, plans: list[TokenPlan]) -> list[Finding]:
    """Encoders that see the prompt but get no vectors read the token as ordinary text."""
    clip = [name for name, (_, tokenizer) in live.encoders(pipe).items() if "CLIP" in type(tokenizer).__name__]
    served = {one.encoder for one in plans}
    message = "{} gets no vectors and reads the token as ordinary text"
    return [Finding("encoder-without-vectors", "warning", message.format(name)) for name in clip if name not in served]


def _add(pipe: Any, one: TokenPlan) -> None:
    encoder, tokenizer = live.encoders(pipe)[one.encoder]
    if not token_tables.served(pipe, encoder):
        token_tables.add(encoder, tokenizer, one.names(), one.vectors)
        return
    flag = encoder.get_input_embeddings().weight.requires_grad
    with live.aside():  # resizing draws random rows, all of which are overwritten
        pipe.load_textual_inversion(one.vectors, token=one.token, text_encoder=encoder, tokenizer=tokenizer)
    encoder.get_input_embeddings().weight.requires_grad_(flag)


def _verify(encoder: Any, tokenizer: Any, one: TokenPlan) -> None:
    import torch

    ids = tokenizer.convert_tokens_to_ids(list(one.names()))
    held = encoder.get_input_embeddings().weight.detach()[ids].cpu()
    read = [tokenizer(f"a {name}", add_special_tokens=False).input_ids[-1] for name in one.names()]
    if not torch.equal(held, one.vectors) or read != ids:
        raise LoadMismatch(f"{one.encoder} does not read {one.token} as the {len(ids)} vectors of the file")


def _pooling(encoder: Any) -> Any:
    """The module that knows where a prompt ends: the encoder itself, or ``text_model`` inside it."""
    return getattr(encoder, "text_model", encoder)


def _point_at_eos(encoder: Any, tokenizer: Any) -> None:
    """Pool at the end of the prompt. Without new tokens the end has the highest id, so nothing changes for other prompts."""
    if getattr(_pooling(encoder), "eos_token_id", None) == _LEGACY_EOS:
        _pooling(encoder).eos_token_id = tokenizer.eos_token_id


def _restore_eos(encoder: Any, tokenizer: Any) -> None:
    added = any(not token.special for token in tokenizer.added_tokens_decoder.values())
    legacy = getattr(encoder.config, "eos_token_id", None) == _LEGACY_EOS
    if legacy and not added and hasattr(_pooling(encoder), "eos_token_id"):
        _pooling(encoder).eos_token_id = _LEGACY_EOS
