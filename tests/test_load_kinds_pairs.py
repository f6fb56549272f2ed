"""DreamArtist pairs: one concept, two embeddings, each in its own prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hubtool.actions.load import load, unload
from hubtool.errors import UsageProblem
from tests.support import kinds, tiny


@pytest.fixture
def pipe() -> Any:
    return kinds.wide()


def rows(pipe: Any, tokens: tuple[str, ...]) -> torch.Tensor:
    return pipe.text_encoder.get_input_embeddings().weight.detach()[pipe.tokenizer.convert_tokens_to_ids(list(tokens))]


def test_the_negative_half_comes_with_the_positive_one_and_goes_with_it(pipe: Any, tmp_path: Path) -> None:
    words, before = pipe.tokenizer.get_vocab(), tiny.weights(pipe)
    report = load(pipe, kinds.pair(tmp_path))
    assert report.tokens == {"text_encoder": ("art", "art_1", "art-neg", "art-neg_1", "art-neg_2")}
    assert report.negatives == ("art-neg",)
    assert torch.equal(rows(pipe, report.tokens["text_encoder"][2:]), kinds.values(3, kinds.WIDTH, seed=2))
    assert any("art-neg in negative prompts" in finding.message for finding in report.findings)
    assert report.to_json()["negatives"] == ["art-neg"]
    unload(pipe, "art")
    assert pipe.tokenizer.get_vocab() == words
    assert tiny.same(tiny.weights(pipe), before)


def test_both_halves_follow_the_name_that_is_asked_for(pipe: Any, tmp_path: Path) -> None:
    report = load(pipe, kinds.pair(tmp_path, negative="art"), token="<Mine>")
    assert report.negatives == ("<mine-neg>",)
    assert report.tokens["text_encoder"][0] == "<mine>"


def test_one_half_can_be_had_alone(pipe: Any, tmp_path: Path) -> None:
    alone = load(pipe, kinds.pair(tmp_path), settings={"pair": False})
    assert alone.tokens == {"text_encoder": ("art", "art_1")}
    other = load(pipe, tmp_path / "art-neg.pt")
    assert other.tokens == {"text_encoder": ("art-neg", "art-neg_1", "art-neg_2")}
    assert any("the negative half of art.pt" in finding.message for finding in other.findings)
    with pytest.raises(UsageProblem, match="knows the token"):
        load(pipe, tmp_path / "art.pt", name="again")


def test_an_embedding_without_a_partner_is_what_it_was(pipe: Any, tmp_path: Path) -> None:
    report = load(pipe, kinds.half(tmp_path / "art.pt", 2, 1))
    assert (report.negatives, report.tokens) == ((), {"text_encoder": ("art", "art_1")})
