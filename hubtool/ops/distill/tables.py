"""Token tables of two pipelines: rows that only the tuned one has become token embeddings, rows of old tokens that changed are told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from hubtool.adapters.ir import Embedding
from hubtool.errors import UsageProblem
from hubtool.ops.distill.words import added, words
from hubtool.ops.extract.changes import alike
from hubtool.ops.sides import ParameterKey, Side
from hubtool.tensors import expr as e
from hubtool.tensors.evaluate import compute
from hubtool.tensors.expr import Expr
from hubtool.types import Shape

_TABLES = frozenset({"token_embedding", "embed_tokens", "shared"})
_ROWS = 4096  # of a table that are compared at once


@dataclass(frozen=True, slots=True)
class Table:
    """The token table of one encoder on both sides. ``added``: id -> token of the rows that the base has no word for.

    ``known``: id -> word, as far as the tokenizers' documents tell; ``named``: the names of ``added`` are the tuned pipeline's own.
    """

    key: ParameterKey
    base: Expr
    tuned: Expr
    added: Mapping[int, str]
    known: Mapping[int, str]
    named: bool = True

    @property
    def component(self) -> str:
        return self.key[0]

    @property
    def rows(self) -> int:
        """Rows that both sides have."""
        return min(self.base.shape[0], self.tuned.shape[0])


def tables(base: Side, tuned: Side, names: Sequence[str] = ()) -> list[Table]:
    """The token tables of encoders that both sides have. ``names``: what the new tokens are called, where no tokenizer tells.

    Raises ``UsageProblem`` for a number of names that is not that of the new rows.
    """
    before = dict(base.parameters())
    return [
        _table(base, tuned, key, before[key], own, names)
        for key, own in tuned.parameters()
        if key in before and is_table(key, own.shape) and own.shape[1:] == before[key].shape[1:]
    ]


def is_table(key: ParameterKey, shape: Shape) -> bool:
    """Whether a parameter is the token table of a text encoder."""
    component, parameter = key
    module, _, last = parameter.rpartition(".")
    named = last == "weight" and module.rpartition(".")[2] in _TABLES
    return named and component.startswith("text_encoder") and len(shape) == 2


def _table(base: Side, tuned: Side, key: ParameterKey, before: Expr, after: Expr, names: Sequence[str]) -> Table:
    old, new = words(base.file.path, key[0]), words(tuned.file.path, key[0])
    rows = after.shape[0]
    found = {at: word for at, word in new.items() if before.shape[0] <= at < rows}
    if old:  # a table may have had rows to spare
        found |= _spare(added(tuned.file.path, key[0]), old, before, after)
    if found and not names:
        return Table(key, before, after, dict(sorted(found.items())), {**new, **old})
    bare = sorted(found) or list(range(before.shape[0], rows))
    if names and bare and len(names) != len(bare):
        text = f"{key[0]} has {len(bare)} new tokens, {len(names)} names were given"
        raise UsageProblem(text, hint="--token NAME, once for each new row")
    called = names or [f"<s{at}>" for at in range(len(bare))]
    return Table(key, before, after, dict(zip(bare, called, strict=False)), {**new, **old}, named=bool(names))


def _spare(words: Mapping[int, str], old: Mapping[int, str], before: Expr, after: Expr) -> dict[int, str]:
    """New tokens in rows that the base has without a word for them. Their vectors tell them from words that it merely does not list."""
    rows = min(before.shape[0], after.shape[0])
    unknown = {at: word for at, word in words.items() if at < rows and at not in old}
    return {
        at: word
        for at, word in unknown.items()
        if not alike(*(compute(e.rows(one, at, at + 1)) for one in (before, after)))
    }


def trimmed(side: Side, found: Sequence[Table]) -> Side:
    """``side`` with its tables cut to the rows that both have, so that they are of one shape."""
    weights = {component: dict(own) for component, own in side.checkpoint.weights.items()}
    for table in found:
        component, parameter = table.key
        whole = weights[component][parameter]
        if whole.shape[0] > table.rows:
            weights[component][parameter] = e.rows(whole, 0, table.rows)
    return replace(side, checkpoint=replace(side.checkpoint, weights=weights))


def embeddings(found: Sequence[Table]) -> tuple[Embedding, ...]:
    """The new tokens with their vectors, bit for bit; ``<a>``, ``<a>_1``, ``<a>_2`` are vectors of one token, as diffusers names them."""
    made: dict[tuple[str, str], Embedding] = {}
    for table in found:
        for token, rows in _grouped(table.added):
            vectors = e.concat(tuple(e.rows(table.tuned, at, at + 1) for at in rows))
            made.setdefault((token, table.component), Embedding(token, table.component, vectors))
    return tuple(made.values())


def _grouped(added: Mapping[int, str]) -> Iterator[tuple[str, list[int]]]:
    ids = {word: at for at, word in added.items()}
    for at, word in added.items():
        head, mark, number = word.rpartition("_")
        if mark and number.isdecimal() and head in ids and f"{head}_1" in ids:
            continue  # a further vector of ``head``
        rows = [at]
        while f"{word}_{len(rows)}" in ids:
            rows.append(ids[f"{word}_{len(rows)}"])
        yield word, rows


def changed(table: Table) -> list[str]:
    """The old tokens whose vectors are not those of the base, by word or number."""
    found = []
    for start in range(0, table.rows, _ROWS):
        stop = min(start + _ROWS, table.rows)
        before, after = (compute(e.rows(one, start, stop)) for one in (table.base, table.tuned))
        if not alike(before, after):
            found += [start + at for at in range(stop - start) if not alike(before[at], after[at])]
    return [table.known.get(at, f"number {at}") for at in found if at not in table.added]
