"""Tokens in every text encoder: CLIP and T5, trained alone or with low-rank layers, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hubtool
from hubtool.adapters.ir import Adapter, Embedding
from hubtool.errors import Unsupported
from hubtool.pipelines import live, token_tables
from hubtool.pipelines.tiny import build
from hubtool.training import loop, result
from hubtool.training.config import Output
from hubtool.training.methods import method
from hubtool.training.parts.base import literal
from hubtool.training.session import session
from hubtool.training.train import joined, train
from tests.support.training import bits, config, whole

ENCODERS = {
    "sd1": {"text_encoder"}, "sd2": {"text_encoder"}, "sdxl": {"text_encoder", "text_encoder_2"},
    "sd3": {"text_encoder", "text_encoder_2", "text_encoder_3"}, "flux1": {"text_encoder", "text_encoder_2"},
}  # fmt: skip


def states(pipe: Any, component: str, text: str) -> torch.Tensor:
    encoder, tokenizer = live.encoders(pipe)[component]
    spelled = pipe.maybe_convert_prompt(text, tokenizer) if hasattr(pipe, "maybe_convert_prompt") else text
    spelled = token_tables.spoken(pipe, tokenizer, spelled)
    with torch.no_grad():
        return encoder(tokenizer(spelled, return_tensors="pt").input_ids)[0]


@pytest.mark.parametrize("family", ENCODERS)
def test_every_encoder_learns_and_loading_gives_what_training_had(family: str, tmp_path: Path) -> None:
    pipe = whole(family)
    before, known = bits(pipe), {name: len(t) for name, (_, t) in live.encoders(pipe).items()}
    settings = config(tmp_path, "textual-inversion", "tokens.vectors=2", "optimiser.token_rate=0.1", "tokens.noise=0.5")
    with session(pipe, settings, method("textual-inversion"), lambda: None) as made:
        start = {name: rows.detach().clone() for name, rows in made.parts[0].rows.items()}
        loop.update(made, 0)
        assert all(not torch.equal(made.parts[0].rows[name], rows) for name, rows in start.items())
        assert all(bool((made.parts[0].rows[name] != rows).any(1).all()) for name, rows in start.items())
        trained = joined(pipe, made.parts)
        wanted = {name: states(pipe, name, "a <cat>, so") for name in start}
    assert set(start) == ENCODERS[family]
    assert {name: len(t) for name, (_, t) in live.encoders(pipe).items()} == known
    hubtool.load(pipe, trained, name="back")
    for name, value in wanted.items():
        torch.testing.assert_close(states(pipe, name, "a <cat>, so"), value, rtol=1e-5, atol=1e-6)
    hubtool.unload(pipe, "back")
    after = bits(pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_no_row_of_any_table_moves_but_the_new_ones(tmp_path: Path) -> None:
    pipe = whole("sd3")
    settings = config(tmp_path, "pivotal", "optimiser.token_rate=0.1", "optimiser.weight_decay=0.5")
    with session(pipe, settings, method("pivotal"), lambda: None) as made:
        held = {name: e.get_input_embeddings().weight for name, (e, _) in live.encoders(pipe).items()}
        before = {name: table.detach().clone() for name, table in held.items()}
        loop.update(made, 0)
        assert all(torch.equal(held[name], value) for name, value in before.items())


def test_t5_is_left_out_when_asked(tmp_path: Path) -> None:
    pipe = whole("flux1")
    settings = config(tmp_path, "textual-inversion", "tokens.encoders=clip")
    with session(pipe, settings, method("textual-inversion"), lambda: None) as made:
        assert set(made.parts[0].rows) == {"text_encoder"}
        assert made.encoders == [pipe.text_encoder]


@pytest.mark.parametrize("family", ["sd3", "flux1"])
def test_pivotal_tuning_writes_all_encoders_of_a_transformer(family: str, tmp_path: Path) -> None:
    done = train(config(tmp_path, "pivotal", "run.steps=1", "tokens.vectors=2"), whole(family))
    layers, token = done.written.files
    assert any("lora_A" in key for key in load_file(layers))
    keys = {"clip_l", "clip_g", "t5"} if family == "sd3" else {"clip_l", "t5"}
    assert load_file(token).keys() == keys


@pytest.mark.parametrize(
    ("family", "widths"),
    [
        ("sdxl", {"text_encoder": 768, "text_encoder_2": 1280}),
        ("sd3", {"text_encoder": 768, "text_encoder_2": 1280, "text_encoder_3": 4096}),
        ("flux1", {"text_encoder": 768, "text_encoder_2": 4096}),
    ],
)
def test_the_file_of_a_family_tells_it_and_its_encoders(family: str, widths: dict[str, int], tmp_path: Path) -> None:
    rows = tuple(Embedding("<cat>", name, literal(torch.ones(2, width))) for name, width in widths.items())
    written = result.write(Adapter(family, {}, rows), Output(folder=str(tmp_path), name="cat"), {}, force=False)
    told = hubtool.inspect(written.main).to_json()
    assert (told["family"], told["trigger_words"]) == (family, ["<cat>"])
    assert {(one["encoder"], one["vectors"], one["dim"]) for one in told["embeddings"]} == {
        (name, 2, width) for name, width in widths.items()
    }


def test_diffusers_loads_a_trained_token_into_both_encoders_of_flux(tmp_path: Path) -> None:
    pipe = whole("flux1")
    done = train(config(tmp_path, "textual-inversion", "run.steps=1", "tokens.vectors=2"), pipe)
    held = load_file(done.written.main)
    for key, (encoder, tokenizer) in zip(("clip_l", "t5"), live.encoders(pipe).values(), strict=True):
        pipe.load_textual_inversion(held[key], token="<cat>", text_encoder=encoder, tokenizer=tokenizer)
        ids = tokenizer.convert_tokens_to_ids(["<cat>", "<cat>_1"])
        assert torch.equal(encoder.get_input_embeddings().weight[ids], held[key])


def concept(token: str, width: int, count: int) -> Embedding:
    return Embedding(
        token, "text_encoder_2", literal(torch.randn(count, width, generator=torch.Generator().manual_seed(count)))
    )


def test_spare_rows_of_a_table_serve_tokens_and_get_their_bits_back() -> None:
    pipe = whole("flux1")
    encoder, tokenizer = live.encoders(pipe)["text_encoder_2"]
    encoder.resize_token_embeddings(len(tokenizer) + 2)
    width = encoder.get_input_embeddings().embedding_dim
    before, known = encoder.get_input_embeddings().weight.detach().clone(), len(tokenizer)
    hubtool.load(pipe, Adapter(None, {}, (concept("<one>", width, 1),)), name="one")
    assert encoder.get_input_embeddings().num_embeddings == known + 2
    hubtool.load(pipe, Adapter(None, {}, (concept("<two>", width, 3),)), name="two")
    assert encoder.get_input_embeddings().num_embeddings == known + 4
    hubtool.unload(pipe, "one")
    ids = tokenizer.convert_tokens_to_ids(["<two>", "<two>_1", "<two>_2"])
    assert ids == [known, known + 1, known + 2]
    assert tokenizer("a<two>_1", add_special_tokens=False).input_ids[-1] == known + 1
    again = torch.randn(3, width, generator=torch.Generator().manual_seed(3))
    assert torch.equal(encoder.get_input_embeddings().weight[ids], again)
    hubtool.unload(pipe, "two")
    assert torch.equal(encoder.get_input_embeddings().weight, before)
    assert len(tokenizer) == known
    assert "<two>" not in tokenizer.get_vocab()


def test_a_table_shorter_than_its_vocabulary_is_refused() -> None:
    pipe = whole("flux1")
    encoder, tokenizer = live.encoders(pipe)["text_encoder_2"]
    encoder.resize_token_embeddings(len(tokenizer) - 1)
    with pytest.raises(Unsupported, match="rows for"):
        hubtool.load(pipe, Adapter(None, {}, (concept("<one>", encoder.config.d_model, 1),)))


def test_all_vectors_are_written_into_prompts_where_the_pipeline_does_not_do_so() -> None:
    pipe = whole("sd3")
    rows = [Embedding("<cat>", name, literal(torch.ones(3, e.get_input_embeddings().embedding_dim))) for name, (e, _) in live.encoders(pipe).items()]  # fmt: skip
    assert token_tables.prompts(pipe, "a <cat>, so") == {"prompt": "a <cat>, so"}
    hubtool.load(pipe, Adapter(None, {}, tuple(rows)), name="cat")
    written = "a <cat> <cat>_1 <cat>_2, so"
    assert token_tables.prompts(pipe, "a <cat>, so") == dict.fromkeys(("prompt", "prompt_2", "prompt_3"), written)
    assert token_tables.prompts(build("sd1"), "a <cat>") == {"prompt": "a <cat>"}


@pytest.mark.parametrize("joint", [True, False])
def test_pivotal_tuning_moves_tokens_first_and_then_layers(joint: bool, tmp_path: Path) -> None:
    more = (
        "tokens.only_steps=1",
        f"tokens.joint={str(joint).lower()}",
        "optimiser.token_rate=0.1",
        "optimiser.rate=0.1",
    )
    with session(build("sd1"), config(tmp_path, "pivotal", *more), method("pivotal"), lambda: None) as made:
        moved = []
        for step in range(2):
            before = {name: p.detach().clone() for name, p in made.parameters.items()}
            loop.update(made, step)
            changed = {name for name, p in made.parameters.items() if not torch.equal(p, before[name])}
            moved.append({"tokens" if name.startswith("tokens.") else "layers" for name in changed})
    assert moved == [{"tokens"}, {"tokens", "layers"} if joint else {"layers"}]
