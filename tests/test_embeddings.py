"""Textual inversion: every encoding parses to the same thing, and goes back to where it came from without losing a bit."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubtool.adapters.ir import Embedding
from hubtool.adapters.token_embeddings import (
    ENCODINGS,
    WIDTHS,
    XTI_LAYERS,
    Parsed,
    canonical_key,
    canonical_metadata,
    emit_embedding,
    parse_bundle,
    parse_embedding,
    raw_embedding,
)
from hubtool.errors import CorruptFile, UsageProblem
from hubtool.formats import open_file
from hubtool.formats.torch_writer import write_torch_zip
from hubtool.layouts.identify import identify
from hubtool.tensors.expr import Expr, Read, sources
from hubtool.tensors.ref import TensorRef
from tests.support.tensor_files import flat, pickled, tensor


def parsed(shapes: Mapping[str, tuple[int, ...]], scalars: Mapping[str, Any] | None = None) -> Parsed | None:
    refs = {name: tensor(name, *shape) for name, shape in shapes.items()}
    return parse_embedding(refs, scalars or {}, "stem")


def must(shapes: Mapping[str, tuple[int, ...]], scalars: Mapping[str, Any] | None = None) -> Parsed:
    found = parsed(shapes, scalars)
    assert found is not None
    return found


def told(found: Parsed) -> list[tuple[str | None, str | None, tuple[int, ...]]]:
    return [(item.token, item.encoder, item.vectors.shape) for item in found.embeddings]


A1111 = {"name": "cat-500", "step": 499}
CASES: dict[
    str,
    tuple[dict[str, tuple[int, ...]], dict[str, Any], str | None, list[tuple[str | None, str | None, tuple[int, ...]]]],
] = {
    "a1111": ({"string_to_param.*": (3, 768)}, A1111, "sd1", [("cat-500", "text_encoder", (3, 768))]),
    "rinongal": (
        {"string_to_token.*": (), "string_to_param._parameters.*": (1, 768)},
        {},
        "sd1",
        [("stem", "text_encoder", (1, 768))],
    ),
    "diffusers": ({"<cat>": (768,)}, {}, None, [("<cat>", "text_encoder", (1, 768))]),
    "kohya": ({"emb_params": (8, 1024)}, {}, "sd2", [("stem", "text_encoder", (8, 1024))]),
    "kohya-sdxl": (
        {"clip_g": (2, 1280), "clip_l": (2, 768)},
        {},
        "sdxl",
        [("stem", "text_encoder_2", (2, 1280)), ("stem", "text_encoder", (2, 768))],
    ),
    "cog-sdxl": (
        {"text_encoders_0": (2, 768), "text_encoders_1": (2, 1280)},
        {},
        "sdxl",
        [("stem", "text_encoder", (2, 768)), ("stem", "text_encoder_2", (2, 1280))],
    ),
    "emb-pair": (
        {"emb": (768,), "emb2": (1280,)},
        {},
        "sdxl",
        [("stem", "text_encoder", (1, 768)), ("stem", "text_encoder_2", (1, 1280))],
    ),
    "xti": (dict.fromkeys(XTI_LAYERS, (1, 768)), {}, "sd1", [("stem", "text_encoder", (1, 768))] * 16),
}


@pytest.mark.parametrize("encoding", CASES)
def test_every_encoding_is_parsed(encoding: str) -> None:
    shapes, scalars, family, expected = CASES[encoding]
    found = must(shapes, scalars)
    assert (found.encoding, found.family, told(found), found.findings) == (encoding, family, expected, ())


def test_flux_and_sd3_embeddings_are_told_by_their_encoders() -> None:
    flux = must({"clip_l": (2, 768), "t5": (5, 4096)})
    assert (flux.family, [item.encoder for item in flux.embeddings]) == ("flux1", ["text_encoder", "text_encoder_2"])
    sd3 = must({"clip_l": (2, 768), "clip_g": (2, 1280), "t5xxl": (2, 4096)})
    assert (sd3.family, sd3.embeddings[2].encoder) == ("sd3", "text_encoder_3")


def test_several_placeholder_tokens_in_one_file_are_several_embeddings() -> None:
    assert told(must({"<a>": (768,), "<b>": (768,)})) == [
        ("<a>", "text_encoder", (1, 768)),
        ("<b>", "text_encoder", (1, 768)),
    ]


def test_several_terms_in_one_a1111_file_keep_their_names() -> None:
    found = must({"string_to_param.*": (1, 768), "string_to_param.dog": (1, 768)}, A1111)
    assert [item.token for item in found.embeddings] == ["cat-500", "dog"]


def test_a_training_history_yields_its_last_snapshot() -> None:
    shapes = {f"{i}.{key}": (size,) for i in range(11) for key, size in (("emb", 768), ("emb2", 1280))}
    found = must(shapes)
    assert [ref.name for item in found.embeddings for ref in sources(item.vectors)] == ["10.emb", "10.emb2"]
    assert [finding.code for finding in found.findings] == ["training-history"]


def test_width_names_the_families_that_fit() -> None:
    assert must({"<a>": (1, 768)}).family_candidates == ("sd1", "sdxl", "flux1", "sd3")
    assert must({"<a>": (1, 1024)}).family == "sd2"
    bare = raw_embedding(tensor("x", 4096), "stem")
    assert bare is not None
    assert (bare.family, bare.family_candidates) == (None, ("flux1", "sd3", "pixart"))


def test_half_of_an_sdxl_embedding_is_a_warning() -> None:
    assert [(finding.code, finding.severity) for finding in must({"clip_l": (1, 768)}).findings] == [
        ("half-embedding", "warning")
    ]


@pytest.mark.parametrize(
    "shapes", [{"emb_params": (1, 123)}, {"clip_l": (2, 77)}, {"string_to_param.*": (2, 2, 768)}, {"emb_params": ()}]
)
def test_vectors_that_fit_no_encoder_are_corrupt(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(CorruptFile):
        parsed(shapes)


def test_a_tiny_encoder_is_possible_but_worth_a_warning() -> None:
    assert [finding.code for finding in must({"<tiny>": (1, 32)}).findings] == ["unknown-width"]


@pytest.mark.parametrize(
    "shapes",
    [
        {"linear.weight": (1, 768)},
        {"weight": (1, 768)},
        {"w": (2, 2)},
        {"table": (49408, 768)},
        {"a": (1, 768), "b": (1, 768)},
        {},
    ],
)
def test_other_tensors_are_no_textual_inversion(shapes: dict[str, tuple[int, ...]]) -> None:
    assert parsed(shapes) is None


def test_bundled_embeddings_are_found_inside_an_adapter() -> None:
    keys = {
        "bundle_emb.cat.string_to_param.*": (2, 768),
        "bundle_emb.dog.emb_params": (1, 768),
        "lora_unet_x.alpha": (),
    }
    found = parse_bundle({name: tensor(name, *shape) for name, shape in keys.items()})
    assert [(item.token, item.vectors.shape) for item in found] == [("cat", (2, 768)), ("dog", (1, 768))]


# --- what the recogniser adds ---------------------------------------------------------------------------------------------------


def test_a_dreamartist_pair_is_hinted_at() -> None:
    found = identify(pickled({"string_to_param": {"*": (6, 768)}, "name": "style-neg"}, stem="style-neg"))
    assert found.flags == ("negative",)
    assert [finding.code for finding in found.findings] == ["dreamartist-pair"]


@pytest.mark.parametrize(
    ("stem", "negative"), [("EasyNegative", True), ("bad_prompt", True), ("badger", False), ("negroni", False)]
)
def test_negative_embeddings_are_told_by_name(stem: str, negative: bool) -> None:
    assert ("negative" in identify(flat({"emb_params": (1, 768)}, stem=stem)).flags) is negative


def test_the_token_is_a_trigger_word() -> None:
    assert identify(flat({"<cat>": (1, 768)}, dtype="F32")).trigger_words == ("<cat>",)


# --- writing ----------------------------------------------------------------------------------------------------------------------

SINGLE = ("a1111", "kohya", "diffusers", "diffusers-bin", "raw", "canonical")
DOUBLE = ("kohya-sdxl", "cog-sdxl", "emb-pair", "canonical")


def embedding(*shape: int, token: str = "<cat>", encoder: str | None = None) -> Embedding:
    return Embedding(token, encoder, Read(tensor("v", *shape)))


def reread(tree: Any) -> Parsed:
    """Parse what an emitter made, with expressions replaced by tensors of their shape that remember their source."""
    if not isinstance(tree, dict):
        found = raw_embedding(again("(root)", tree), "<cat>")
    elif "string_to_param" in tree:
        refs = {f"string_to_param.{key}": again(key, expr) for key, expr in tree["string_to_param"].items()}
        found = parse_embedding(
            refs, {key: value for key, value in tree.items() if not isinstance(value, dict)}, "<cat>"
        )
    else:
        found = parse_embedding({key: again(key, expr) for key, expr in tree.items()}, {}, "<cat>")
    assert found is not None
    return found


def again(name: str, expr: Expr) -> TensorRef:
    [source] = sources(expr)
    return TensorRef(name, expr.dtype, expr.shape, source.path, source.start, source.end)


@given(encoding=st.sampled_from(SINGLE), count=st.integers(1, 9), width=st.sampled_from(sorted(WIDTHS)))
def test_one_encoders_vectors_survive_every_encoding(encoding: str, count: int, width: int) -> None:
    [found] = reread(emit_embedding([embedding(count, width)], encoding)).embeddings
    assert (found.token, found.vectors.shape) == ("<cat>", (count, width))


@given(encoding=st.sampled_from(DOUBLE), count=st.integers(1, 9))
def test_two_encoders_vectors_survive_every_encoding(encoding: str, count: int) -> None:
    pair = [embedding(count, 768, encoder="text_encoder"), embedding(count, 1280, encoder="text_encoder_2")]
    found = reread(emit_embedding(pair, encoding))
    assert [(item.encoder, item.vectors.shape) for item in found.embeddings] == [
        ("text_encoder", (count, 768)),
        ("text_encoder_2", (count, 1280)),
    ]


@pytest.mark.parametrize("encoding", ["a1111", "kohya", "raw"])
def test_an_encoding_for_one_encoder_refuses_two(encoding: str) -> None:
    with pytest.raises(UsageProblem, match="one encoder"):
        emit_embedding([embedding(1, 768), embedding(1, 1280)], encoding)


def test_what_an_encoding_cannot_hold_is_refused() -> None:
    with pytest.raises(UsageProblem, match="no such"):
        emit_embedding([embedding(1, 768)], "webp")
    with pytest.raises(UsageProblem, match="one token"):
        emit_embedding([embedding(1, 768, token="<a>"), embedding(1, 768, token="<b>")], "kohya-sdxl")
    with pytest.raises(UsageProblem, match="no place"):
        emit_embedding([embedding(1, 4096)], "emb-pair")
    with pytest.raises(UsageProblem):
        emit_embedding([], "kohya")


def test_a_token_can_be_renamed_and_scalars_travel() -> None:
    tree = emit_embedding([embedding(1, 768)], "a1111", token="dog", extra={"step": 7, "unrelated": 1})
    assert isinstance(tree, dict)
    assert (tree["name"], tree["step"], "unrelated" in tree) == ("dog", 7, False)


def test_a_canonical_file_remembers_its_token_and_is_not_called_half() -> None:
    notes = canonical_metadata("<cat>", "a1111", "ab" * 32)
    found = must({"clip_l": (1, 768)}, notes)
    assert (found.encoding, told(found), found.findings) == ("canonical", [("<cat>", "text_encoder", (1, 768))], ())


def test_every_named_encoding_can_be_written() -> None:
    for encoding in ENCODINGS:
        assert emit_embedding([embedding(1, 768)], encoding)
    assert canonical_key(embedding(1, 32)) == "emb_32"


def test_a_written_a1111_file_is_read_by_torch_and_keeps_its_bytes(tmp_path: Path) -> None:
    import torch

    values = struct.pack("<1536f", *(0.25 * i for i in range(1536)))
    item = Embedding("cat", "text_encoder", Read(tensor("v", 2, 768, inline=values)))
    path = tmp_path / "cat.pt"
    write_torch_zip(path, emit_embedding([item], "a1111"))
    loaded = torch.load(path, weights_only=True)
    assert loaded["string_to_token"] == {"*": 265}
    assert loaded["string_to_param"]["*"].flatten().tolist() == list(struct.unpack("<1536f", values))
    assert identify(open_file(path)).embeddings[0].to_json() == {
        "token": "cat",
        "vectors": 2,
        "dim": 768,
        "encoder": "text_encoder",
    }
