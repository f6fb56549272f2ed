"""The words of a pipeline folder without its encoders: tokenizers, and the sizes of the token tables they index."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubtool.adapters.ir import Adapter
from hubtool.errors import CorruptFile, FileMissing, LoadMismatch, MissingExtra, Unsupported
from hubtool.pipelines import live
from hubtool.pipelines.tokens import TokenPlan, plan_tokens
from hubtool.tensors.dtypes import TORCH_NAME
from hubtool.types import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

_LEGACY_EOS = 2  # transformers pull request 24773: with this id, CLIP pools at the highest id of the prompt


@dataclass(slots=True)
class _Encoder:
    """Stands for a text encoder: its token table on no device at all."""

    rows: int
    width: int
    dtype: str

    def get_input_embeddings(self) -> Any:
        import torch

        dtype = getattr(torch, TORCH_NAME[self.dtype])
        return torch.nn.Embedding(self.rows, self.width, device="meta", dtype=dtype)


class Vocabulary:
    """Learns tokens as a live pipeline does, and writes its tokenizers. ``tables``: encoder -> (rows, width, dtype) of its token table.

    ``classes``: tokenizer -> its class of transformers, as the pipeline's index names it. Raises ``MissingExtra`` without transformers,
    ``FileMissing`` for an encoder without a tokenizer, ``CorruptFile`` for one that transformers cannot read.
    """

    def __init__(
        self, folder: Path, tables: Mapping[str, tuple[int, int, str]], classes: Mapping[str, str | None]
    ) -> None:
        self.folder, self.classes = folder, classes
        self.learnt: dict[str, list[Any]] = {}
        for name, (rows, width, dtype) in tables.items():
            setattr(self, name, _Encoder(rows, width, dtype))
            tokenizer = name.replace("text_encoder", "tokenizer")
            setattr(self, tokenizer, self._opened(tokenizer, folder))

    def _opened(self, name: str, folder: Path) -> Any:
        try:
            import transformers
        except ImportError:
            raise MissingExtra("adding tokens to a tokenizer", "diffusers") from None
        if not (folder / name).is_dir():
            raise FileMissing("there is no tokenizer to add the new tokens to", path=folder / name)
        kind = getattr(transformers, self.classes.get(name) or "", transformers.AutoTokenizer)
        with _explained(folder / name), live.aside():
            return kind.from_pretrained(str(folder / name))

    def load_textual_inversion(self, one: TokenPlan) -> None:
        """Add the tokens of ``one`` behind the last row of its encoder's table. Raises ``Unsupported`` where their ids are others."""
        encoder, tokenizer = live.encoders(self)[one.encoder]
        tokenizer.add_tokens(list(one.names()))
        ids = tokenizer.convert_tokens_to_ids(list(one.names()))
        if ids != list(range(encoder.rows, encoder.rows + len(ids))):
            raise Unsupported(f"the tokenizer of {one.encoder} gives {one.token} the ids {ids}, not those of new rows")
        encoder.rows += len(ids)
        self.learnt.setdefault(one.encoder, []).append(one.vectors)

    def learn(self, adapter: Adapter) -> tuple[list[TokenPlan], list[Finding]]:
        """Take the tokens of an adapter in. Raises what ``plan_tokens`` raises: tokens that are taken, widths that no encoder has."""
        plans, findings = plan_tokens(self, adapter, None)
        for one in plans:
            self.load_textual_inversion(one)
        return plans, findings

    def save(self, folder: Path) -> dict[str, Path]:
        """Write the tokenizers that have learnt something below ``folder``; name in a pipeline's folder -> file.

        Raises ``LoadMismatch`` when what was written does not read the new tokens as the same ids.
        """
        found: dict[str, Path] = {}
        for encoder in self.learnt:
            name = encoder.replace("text_encoder", "tokenizer")
            tokenizer = getattr(self, name)
            tokenizer.save_pretrained(str(folder / name))
            again = self._opened(name, folder)
            if again.get_vocab() != tokenizer.get_vocab():
                raise LoadMismatch(f"{name} does not come back from disk as it was written", path=self.folder / name)
            found |= {f"{name}/{path.name}": path for path in sorted((folder / name).iterdir())}
        return found

    def config(self, encoder: str, document: Mapping[str, Any]) -> dict[str, Any]:
        """The encoder's configuration with its new vocabulary. A legacy end of text would pool at the new tokens, so it is named."""
        made, rows = dict(document), getattr(self, encoder).rows
        inner = made.get("text_config")
        if isinstance(inner, Mapping) and "vocab_size" in inner:
            made["text_config"] = {**inner, "vocab_size": rows}
        else:
            made["vocab_size"] = rows
        if made.get("eos_token_id") == _LEGACY_EOS and str(made.get("model_type", "")).startswith("clip"):
            made["eos_token_id"] = live.encoders(self)[encoder][1].eos_token_id
        return made


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CorruptFile(f"transformers cannot read this tokenizer: {said}", path=path) from error
