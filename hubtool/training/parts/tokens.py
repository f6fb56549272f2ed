"""New tokens: their vectors are parameters of their own, laid over the frozen table, so that no other row can ever move.

Gal et al. 2022 (arXiv 2208.01618). The pull of the norm is that of cloneofsimo/lora (``clip_ti_decay``), with the table's own norm in
place of 0.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hubtool.adapters.ir import Adapter, Embedding
from hubtool.errors import Unsupported, UsageProblem
from hubtool.pipelines import live, load, token_tables, unload
from hubtool.pipelines.families import family_of
from hubtool.training import seeds
from hubtool.training.bases.base import Base
from hubtool.training.config import Config, Tokens
from hubtool.training.parts.base import Group, literal

_NAME = "trained_tokens"


class TokensPart:
    """``rows``: encoder -> (n, width) parameter; the order is that of the tokens, each with all of its vectors."""

    def __init__(self, base: Base, config: Config) -> None:
        self.pipe, self.asked = base.pipe, config.tokens
        check(self.asked)
        encoders = learners(base, self.asked)
        norms = {name: _norm(*pair, self.asked) for name, pair in encoders.items()}
        start = {name: _start(name, *pair, self.asked, config.run.seed) for name, pair in encoders.items()}
        load(self.pipe, _adapter(start, self.asked), name=_NAME)
        self.rows = {name: _laid_over(encoder, start[name]) for name, (encoder, _) in encoders.items()}
        self.norms = norms
        self.hooks = [hook for name, pair in encoders.items() for hook in _hooks(*pair, self.rows[name], self.asked)]
        held = {f"tokens.{name}": rows for name, rows in self.rows.items()}
        self.groups: tuple[Group, ...] = (Group("tokens", held, config.optimiser.token_rate, 0.0),)

    def after_step(self, step: int) -> None:
        """Pull each vector's norm towards the table's; the direction stays."""
        import torch

        with torch.no_grad():
            for name, rows in self.rows.items() if self.asked.norm_decay else ():
                norm = rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
                rows.mul_(1.0 + self.asked.norm_decay * (self.norms[name] - norm) / norm)

    def adapter(self) -> Adapter:
        found = _adapter({name: rows.detach() for name, rows in self.rows.items()}, self.asked)
        return Adapter(family_of(self.pipe), {}, found.embeddings)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        unload(self.pipe, _NAME)


def check(asked: Tokens) -> None:
    """Raise ``UsageProblem`` for names that no prompt could hold."""
    if not asked.names:
        raise UsageProblem("no new token is named", hint="--set 'tokens.names=[\"<cat>\"]'")
    wrong = [name for name in asked.names if name != name.lower() or not name.strip() or len(name.split()) != 1]
    if wrong or len(set(asked.names)) < len(asked.names):
        raise UsageProblem(f"tokens are different lower-case words: {', '.join(wrong or asked.names)}")


def learners(base: Base, asked: Tokens) -> dict[str, tuple[Any, Any]]:
    """The text encoders that learn the tokens: CLIP's, and T5 unless ``tokens.encoders`` leaves it out."""
    pairs = live.encoders(base.pipe)
    clip = {name: pair for name, pair in pairs.items() if type(pair[0]).__name__.startswith("CLIP")}
    found = clip if asked.encoders == "clip" else pairs
    if not found:
        raise Unsupported(f"{type(base.pipe).__name__} has no text encoder that could learn a token")
    return found


def _start(name: str, encoder: Any, tokenizer: Any, asked: Tokens, seed: int) -> Any:
    """(tokens * vectors, width) in fp32: the start word's vectors in turn, or the mean of the table, and noise."""
    import torch

    table = encoder.get_input_embeddings().weight.detach().float().cpu()
    if asked.start:
        ids = tokenizer(asked.start, add_special_tokens=False).input_ids
        source = table[ids] if ids else table.mean(0, keepdim=True)
    else:
        source = table.mean(0, keepdim=True)
    count = len(asked.names) * asked.vectors
    rows = source[[at % asked.vectors % len(source) for at in range(count)]]
    noise = torch.randn(rows.shape, generator=seeds.generator(seed, "tokens", name))
    return rows + asked.noise * table.std() * noise


def _adapter(rows: dict[str, Any], asked: Tokens) -> Adapter:
    embeddings = [
        Embedding(token, encoder, literal(values[at * asked.vectors : (at + 1) * asked.vectors]))
        for encoder, values in rows.items()
        for at, token in enumerate(asked.names)
    ]
    return Adapter(None, {}, tuple(embeddings))


def _laid_over(encoder: Any, start: Any) -> Any:
    from torch import nn

    return nn.Parameter(start.clone().to(encoder.get_input_embeddings().weight.device))


def _hooks(encoder: Any, tokenizer: Any, rows: Any, asked: Tokens) -> list[Any]:
    """Make the embedding answer with ``rows`` for the new ids."""
    import torch

    names = [name for token in asked.names for name in token_tables.names_of(token, asked.vectors)]
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(names), device=rows.device)

    def answer(module: Any, inputs: Sequence[Any], output: Any) -> Any:
        same = inputs[0][..., None] == ids
        new = rows[same.long().argmax(-1)].to(output.dtype)
        return torch.where(same.any(-1)[..., None], new, output)

    return [table.register_forward_hook(answer) for table in token_tables.tables(encoder)]


def _norm(encoder: Any, tokenizer: Any, asked: Tokens) -> float:
    """The norm to pull to: the median of the table's rows before the new ones. T5's spare rows are of no token."""
    table = encoder.get_input_embeddings().weight.detach()
    return asked.norm or float(table[: len(tokenizer)].float().norm(dim=1).median())
