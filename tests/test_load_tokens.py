"""Textual inversion in tiny pipelines: every vector counts, nothing else moves, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hubtool.actions.load import load, unload
from hubtool.adapters.ir import Adapter, Embedding
from hubtool.errors import BadValues, HubtoolError, LoadMismatch, ShapeMismatch, Unsupported, UsageProblem
from tests.support import tiny
from tests.support.files import write_safetensors


@pytest.fixture
def pipe() -> Any:
    return tiny.build("sd1")


def concept(*embeddings: Embedding) -> Adapter:
    return Adapter(None, {}, embeddings)


def ids(tokenizer: Any, prompt: str) -> list[int]:
    return tokenizer(prompt, add_special_tokens=False).input_ids


def by_hand(pipe: Any, prompt: str, vectors: torch.Tensor, at: int) -> torch.Tensor:
    """The prompt's encoding with rows ``at`` and following of the token table's output replaced, without any new token."""

    def replaced(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[0, at : at + len(vectors)] = vectors
        return output

    hook = pipe.text_encoder.get_input_embeddings().register_forward_hook(replaced)
    try:
        return tiny.encoded(pipe.text_encoder, pipe.tokenizer, prompt)[0]
    finally:
        hook.remove()


def test_all_vectors_reach_the_encoder_where_the_token_stands(pipe: Any) -> None:
    made = tiny.embedding("<cat>", 32, 3)
    expected = by_hand(pipe, "a xyz", torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), at=2)
    report = load(pipe, concept(made), name="cat")
    assert report.tokens == {"text_encoder": ("<cat>", "<cat>_1", "<cat>_2")}
    prompt = pipe.maybe_convert_prompt("a <cat>", pipe.tokenizer)
    mine = tiny.encoded(pipe.text_encoder, pipe.tokenizer, prompt)[0]
    assert ids(pipe.tokenizer, "a xyz")[0] == ids(pipe.tokenizer, prompt)[0]
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


def test_unloading_leaves_no_trace(pipe: Any) -> None:
    before, picture, config = tiny.weights(pipe), tiny.picture(pipe), pipe.text_encoder.config.to_dict()
    words = pipe.tokenizer.get_vocab()
    load(pipe, concept(tiny.embedding("<cat>", 32, 3)), name="cat")
    assert not torch.equal(tiny.picture(pipe, "a <cat>"), picture)
    unload(pipe, "cat")
    after = tiny.weights(pipe)
    assert all(torch.equal(value, after[c][name]) for c, state in before.items() for name, value in state.items())
    assert torch.equal(tiny.picture(pipe), picture)
    assert pipe.text_encoder.config.to_dict() == config
    assert pipe.tokenizer.get_vocab() == words
    load(pipe, concept(tiny.embedding("<cat>", 32, 2)), name="cat")


def test_removing_one_concept_leaves_the_other_its_vectors(pipe: Any) -> None:
    load(pipe, concept(tiny.embedding("<one>", 32, 2, seed=1)), name="one")
    load(pipe, concept(tiny.embedding("<two>", 32, 3, seed=2)), name="two")
    picture = tiny.picture(pipe, "a <two>")
    unload(pipe, "one")
    assert torch.equal(tiny.picture(pipe, "a <two>"), picture)
    unload(pipe, "<two>")
    assert pipe.tokenizer.get_vocab() == tiny.build("sd1").tokenizer.get_vocab()


def test_both_encoders_of_sdxl_learn_their_own_vectors() -> None:
    pipe = tiny.build("sdxl")
    before = tiny.weights(pipe)
    wide = tiny.embedding("<s0>", 24, 2, seed=3)
    report = load(pipe, concept(tiny.embedding("<s0>", 16, 2), wide), name="person")
    assert report.tokens == {"text_encoder": ("<s0>", "<s0>_1"), "text_encoder_2": ("<s0>", "<s0>_1")}
    table = pipe.text_encoder_2.get_input_embeddings().weight
    assert tiny.literal(table[pipe.tokenizer_2.convert_tokens_to_ids(["<s0>", "<s0>_1"])]) == wide.vectors
    unload(pipe, "person")
    assert {c: list(s) for c, s in tiny.weights(pipe).items()} == {c: list(s) for c, s in before.items()}


def test_an_encoder_without_vectors_is_reported() -> None:
    report = load(tiny.build("sdxl"), concept(tiny.embedding("<s0>", 16)))
    assert [(f.code, f.message.split()[0]) for f in report.findings] == [("encoder-without-vectors", "text_encoder_2")]


def test_the_pooled_output_stays_at_the_end_of_the_prompt() -> None:
    """With the published eos_token_id 2, CLIP pools at the highest id, which would be the new token."""
    pipe = tiny.build("sdxl")
    plain = tiny.encoded(pipe.text_encoder_2, pipe.tokenizer_2, "a cat").text_embeds
    load(pipe, concept(tiny.embedding("<s0>", 24)), name="person")
    made = tiny.encoded(pipe.text_encoder_2, pipe.tokenizer_2, "a <s0> cat")
    at_end = made.last_hidden_state[:, len(ids(pipe.tokenizer_2, "a <s0> cat")) + 1]
    with torch.no_grad():
        torch.testing.assert_close(made.text_embeds, pipe.text_encoder_2.text_projection(at_end))
    assert torch.equal(tiny.encoded(pipe.text_encoder_2, pipe.tokenizer_2, "a cat").text_embeds, plain)
    unload(pipe, "person")
    assert pipe.text_encoder_2.text_model.eos_token_id == 2


def test_a_mixed_case_token_is_lower_cased_and_says_so(pipe: Any) -> None:
    report = load(pipe, concept(tiny.embedding("<Cat>", 32, 2)))
    assert report.tokens == {"text_encoder": ("<cat>", "<cat>_1")}
    assert [f.code for f in report.findings] == ["token-lower-cased"]
    assert len(ids(pipe.tokenizer, pipe.maybe_convert_prompt("<cat>", pipe.tokenizer))) == 2


def test_a_bare_word_as_token_is_pointed_out(pipe: Any) -> None:
    assert [f.code for f in load(pipe, concept(tiny.embedding("mystyle", 32))).findings] == ["token-inside-words"]


def test_a_given_token_replaces_the_files_own(pipe: Any) -> None:
    pair = concept(tiny.embedding("<a>", 32), tiny.embedding("<b>", 32))
    assert load(pipe, concept(tiny.embedding("<a>", 32)), token="<mine>").tokens == {"text_encoder": ("<mine>",)}
    assert load(pipe, pair, token=["<c>", "<d>"]).tokens == {"text_encoder": ("<c>", "<d>")}
    with pytest.raises(UsageProblem, match=r"2 tokens .*, token= names 1"):
        load(pipe, pair, token="<e>")


NAN = Embedding("<n>", None, tiny.literal(torch.full((1, 32), float("nan"))))
REFUSED: dict[str, tuple[Adapter, dict[str, Any], type[HubtoolError], str]] = {
    "known token": (concept(tiny.embedding("<old>", 32)), {}, UsageProblem, "knows the token <old> already"),
    "known further vector": (concept(tiny.embedding("<other>", 32, 2)), {}, UsageProblem, "<other>_1"),
    "a word of the vocabulary": (concept(tiny.embedding("a", 32)), {}, UsageProblem, "knows the token a already"),
    "tokens that meet": (concept(tiny.embedding("<x>", 32, 2), tiny.embedding("<x>_1", 32)), {}, UsageProblem, "<x>_1"),
    "second of two taken": (concept(tiny.embedding("<y>", 32), tiny.embedding("<old>", 32)), {}, UsageProblem, "<old>"),
    "no token": (concept(tiny.embedding(None, 32)), {}, UsageProblem, "which token"),
    "other width": (concept(tiny.embedding("<w>", 48)), {}, ShapeMismatch, "48 wide; .* text_encoder 32"),
    "NaN": (concept(NAN), {}, BadValues, "NaN"),
    "strength": (concept(tiny.embedding("<s>", 32)), {"strength": 0.5}, UsageProblem, "no strength"),
    "training": (concept(tiny.embedding("<t>", 32)), {"trainable": True}, Unsupported, "training"),
    "other family": (Adapter("sdxl", {}, (tiny.embedding("<f>", 32),)), {}, LoadMismatch, "for sdxl"),
    "empty": (Adapter(None, {}), {}, Unsupported, "nothing in this file"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_learned_is_refused_before_anything_changes(pipe: Any, what: str) -> None:
    adapter, options, error, words = REFUSED[what]
    load(pipe, concept(tiny.embedding("<old>", 32)), name="old")
    load(pipe, concept(tiny.embedding("<other>_1", 32)), name="further")
    vocabulary, table = pipe.tokenizer.get_vocab(), pipe.text_encoder.get_input_embeddings().weight
    with pytest.raises(error, match=words):
        load(pipe, adapter, **options)
    assert pipe.tokenizer.get_vocab() == vocabulary
    assert pipe.text_encoder.get_input_embeddings().weight is table


def test_a_table_longer_than_its_vocabulary_is_not_cut(pipe: Any) -> None:
    pipe.text_encoder.resize_token_embeddings(520)
    with pytest.raises(Unsupported, match="520 rows for 514 tokens"):
        load(pipe, concept(tiny.embedding("<cat>", 32)))


def test_when_the_tokens_fail_the_factors_go_too(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before, loader = tiny.weights(pipe), pipe.load_textual_inversion
    monkeypatch.setattr(pipe, "load_textual_inversion", lambda vectors, **options: loader(vectors * 2, **options))
    both = Adapter(None, tiny.make(pipe, ["unet"], only="to_q").adapter.patches, (tiny.embedding("<cat>", 32, 2),))
    with pytest.raises(LoadMismatch, match="does not read <cat>"):
        load(pipe, both)
    after = tiny.weights(pipe)
    assert {c: list(s) for c, s in after.items()} == {c: list(s) for c, s in before.items()}
    assert all(torch.equal(value, after[c][name]) for c, state in before.items() for name, value in state.items())
    assert pipe.tokenizer.get_vocab() == tiny.build("sd1").tokenizer.get_vocab()


def test_factors_and_tokens_in_one_adapter_come_and_go_together(pipe: Any) -> None:
    picture = tiny.picture(pipe)
    both = Adapter(None, tiny.make(pipe).adapter.patches, (tiny.embedding("<cat>", 32, 2),))
    report = load(pipe, both, name="both", strength=0.5)
    assert set(report.modules) == {"unet", "text_encoder"}
    assert report.tokens
    assert report.to_json()["tokens"] == {"text_encoder": ["<cat>", "<cat>_1"]}
    unload(pipe, "both")
    assert torch.equal(tiny.picture(pipe), picture)


def test_a_file_of_the_concepts_library_is_loaded_under_its_token(pipe: Any, tmp_path: Path) -> None:
    vectors = torch.randn(2, 768)
    pipe.text_encoder = tiny.clip(768)
    path = write_safetensors(
        tmp_path / "cat toy.safetensors", {"<cat-toy>": ("F32", (2, 768), vectors.numpy().tobytes())}
    )
    report = load(pipe, path)
    assert (report.name, report.tokens) == ("cat_toy", {"text_encoder": ("<cat-toy>", "<cat-toy>_1")})
    at = pipe.tokenizer.convert_tokens_to_ids("<cat-toy>_1")
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[at], vectors[1])


def test_a_real_concept_of_ten_vectors_is_read_bit_for_bit(pipe: Any, shared: Path) -> None:
    path = shared / "real" / "ti" / "huggingface__frida_learned_embeds_1.bin"
    stored = torch.load(path, weights_only=True)["<frida>"]
    pipe.text_encoder = tiny.clip(768)
    (names,) = load(pipe, path).tokens.values()
    table = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[pipe.tokenizer.convert_tokens_to_ids(list(names))], stored)
