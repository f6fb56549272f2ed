"""Which programs read a file, and with which defect: every row of schemas/hosts.toml meets a file that it is about."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cache
from itertools import product
from pathlib import Path
from types import MappingProxyType

import pytest

from hubtool.adapters.ir import Patch
from hubtool.adapters.low_rank import LowRank
from hubtool.adapters.registry import make
from hubtool.errors import TableError
from hubtool.formats import open_file
from hubtool.layouts import hosts, tables
from hubtool.layouts.hosts import Verdict, verdicts
from hubtool.layouts.hosts_facts import FACTS, Subject
from hubtool.layouts.parse import parse_file
from hubtool.tensors.expr import Literal
from hubtool.types import Shape
from tests.support.files import floats, scalar, write_safetensors

TABLE = hosts.table()

# algorithm -> role -> shape of a tiny module
TINY: Mapping[str, Mapping[str, Shape]] = {
    "lora": {"up": (8, 2), "down": (2, 8)},
    "locon": {"up": (8, 2, 1, 1), "down": (2, 8, 3, 3)},
    "tucker": {"up": (8, 2, 1, 1), "down": (2, 8, 1, 1), "mid": (2, 2, 3, 3)},
    "loha": {"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)},
    "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)},
    "full": {"diff": (8, 8)},
    "norm": {"w_norm": (8,)},
    "oft": {"oft_blocks": (2, 4, 4)},
    "boft": {"oft_blocks": (2, 2, 4, 4)},
    "glora": {"a1": (8, 2), "a2": (2, 8), "b1": (8, 2), "b2": (2, 8)},
    "ia3": {"ia3": (8,), "on_input": ()},
}
SUFFIX = {"up": "lora_up.weight", "down": "lora_down.weight", "mid": "lora_mid.weight"}
PEFT = {"up": "lora_B.weight", "down": "lora_A.weight", "dora_scale": "lora_magnitude_vector"}


@cache
def zeros(shape: Shape) -> Literal:
    return Literal(bytes(4 * max(1, int(math.prod(shape)))), "F32", shape)


def patch(algorithm: str, alpha: float | None, dora: Shape | None) -> Patch:
    roles = {role: zeros(shape) for role, shape in TINY[algorithm].items()}
    roles |= {"dora_scale": zeros(dora)} if dora else {}
    name = {"locon": "lora", "tucker": "lora", "boft": "oft"}.get(algorithm, algorithm)
    return make(name, roles, alpha)


def subject(
    family: str | None,
    *stems: str,
    algorithm: str = "lora",
    alphas: tuple[float | None, ...] = (None,),
    dora: Shape | None = None,
    spell: Mapping[str, str] = SUFFIX,
    more: tuple[str, ...] = (),
    metadata: Mapping[str, str] = MappingProxyType({}),
    paths: tuple[tuple[str, str], ...] = (),
    single: bool = True,
) -> Subject:
    """A file of tiny modules: the keys a host would see, and the modules behind them."""
    keys: list[str] = []
    patches = {}
    for i, stem in enumerate(stems):
        alpha = alphas[i % len(alphas)]
        made = patch(algorithm, alpha, dora)
        patches[paths[i] if i < len(paths) else ("unet", stem)] = made
        roles = [role for role, _ in made.roles()] + (["alpha"] if alpha is not None and spell is SUFFIX else [])
        keys += [f"{stem}.{spell.get(role, role)}" for role in dict.fromkeys(roles)]
    families = (family,) if family else ()
    return Subject((*keys, *more), patches, families, metadata, single)


def verdict(found: Subject, host: str) -> Verdict:
    return next(one for one in verdicts(found) if one.host.id == host)


STEM = "lora_unet_down_blocks_0_attentions_0_proj_in"
FORMS = {
    "kohya": (STEM, SUFFIX),
    "kohya-oft": ("oft_unet_input_blocks_4_1_proj_in", SUFFIX),
    "lycoris": ("lycoris_down_blocks_0_attentions_0_proj_in", SUFFIX),
    "comfy": ("diffusion_model.input_blocks.4.1.proj_in", PEFT),
    "base-model": ("base_model.model.single_transformer_blocks.0.proj_out", PEFT),
    "xlabs": ("double_blocks.0.processor.qkv_lora1", {"up": "up.weight", "down": "down.weight"}),
    "attn-procs": ("down_blocks.0.attn1.processor.to_q_lora", {"up": "up.weight", "down": "down.weight"}),
    "diffusers-legacy": ("unet.down_blocks.0.attn1.to_q", {"up": "lora.up.weight", "down": "lora.down.weight"}),
    "onetrainer-legacy": ("lora_transformer_transformer_blocks_0_ff_net_2", SUFFIX),
    "onetrainer-bfl": ("transformer.double_blocks.0.img_attn.qkv.0", SUFFIX),
    "bfl": ("double_blocks.0.img_attn.qkv", PEFT),
    "diffusers": ("unet.down_blocks.0.attentions.0.proj_in", PEFT),
    "hcp": ("down_blocks.0.attentions.0.proj_in.___", {"up": "layer.lora_up.weight", "down": "layer.lora_down.weight"}),
    "diffsynth": (
        "down_blocks.0.attentions.0.proj_in",
        {"up": "lora_B.default.weight", "down": "lora_A.default.weight"},
    ),
    "cloneofsimo": ("unet:0", {}),
}
QV = tuple(("text_encoder", f"layers.0.self_attn.{name}") for name in ("q_proj", "v_proj"))
QV_MLP = (*QV, ("text_encoder", "layers.0.mlp.fc1"))
TE = tuple(
    f"lora_te_text_model_encoder_layers_0_{name}" for name in ("self_attn_q_proj", "self_attn_v_proj", "mlp_fc1")
)
SGM, DIFFUSERS = "lora_unet_input_blocks_4_1_proj_in", "lora_unet_down_blocks_1_attentions_0_proj_in"
CONV = ("unet", "down_blocks.0.resnets.0.conv1")
BLOCKS = (("transformer", "blocks.0.attn1.to_q"), ("transformer", "blocks.2.attn1.to_q"))
STALE = {"lora_adapter_metadata": json.dumps({"unet.r": 64})}


def form(name: str, family: str | None, algorithm: str = "lora") -> Subject:
    stem, spell = FORMS[name]
    if name == "cloneofsimo":
        return Subject(
            ("unet:0:up", "unet:0:down"), {("unet", "0"): patch(algorithm, None, None)}, (family,) if family else ()
        )
    return subject(family, stem, algorithm=algorithm, spell=spell)


def early_lokr() -> Subject:
    roles = {"lokr_w1": zeros((20, 60)), "lokr_w2": zeros((16, 48))}
    return Subject((f"{STEM}.lokr_w1", f"{STEM}.lokr_w2"), {CONV: make("lokr", roles, 4.0)}, ("sd1",))


def stabilised() -> Subject:
    made = LowRank(zeros((8, 2)), zeros((2, 8)), alpha_value=2.0, rank_stabilised=True)
    return Subject(("unet.a.lora_A.weight", "unet.a.lora_B.weight"), {("unet", "a"): made}, ("flux1",))


# what the rows about special modules and facts need; each is one bug of spec/layouts.md 4
SPECIAL: Mapping[str, Subject] = {
    "mixed alphas": subject("sd1", STEM, STEM + "1", alphas=(1.0, 4.0)),
    "an alpha missing": subject("sd1", STEM, STEM + "1", alphas=(1.0, None)),
    "mixed names": subject("sdxl", SGM, DIFFUSERS),
    "q and v alone": subject("sd1", *TE[:2], paths=QV),
    "no out_proj": subject("sd1", *TE, paths=QV_MLP),
    "te2 beside diffusers names": subject("sdxl", DIFFUSERS, "lora_te2_text_model_encoder_layers_0_mlp_fc1"),
    "text_projection": subject("sdxl", SGM, "lora_te2_text_projection"),
    "dora per input": subject("sd1", STEM, dora=(1, 8)),
    "dora per output": subject("sd1", STEM, dora=(8, 1)),
    "flat dora": subject("sd1", STEM, dora=(8,)),
    "scaled dora": subject("sd1", STEM, dora=(1, 8), alphas=(1.0,)),
    "dora of wan": subject("wan", "lora_unet_blocks_0_ffn_0", dora=(1, 8)),
    "flux img_in": subject("flux1", "lora_unet_img_in"),
    "flux final layer": subject("flux1", "lora_unet_final_layer_linear", alphas=(1.0,)),
    "flux t5": subject("flux1", "lora_unet_double_blocks_0_img_mlp_0", "lora_te3_encoder_block_0_layer_0_SelfAttention_q"),
    "onetrainer t5": subject("flux1", FORMS["onetrainer-legacy"][0], FORMS["onetrainer-legacy"][0] + "1", more=("lora_te2_encoder_block_0_x.alpha",)),
    "kontext": subject("flux1", "base_model.model.double_blocks.0.img_attn.qkv", spell=PEFT),
    "flux2 lora_down": subject("flux2", "diffusion_model.double_blocks.0.img_mlp.0"),
    "flux2 alpha": subject("flux2", "diffusion_model.double_blocks.0.img_mlp.0", spell=PEFT, more=("diffusion_model.double_blocks.0.img_mlp.0.alpha",)),
    "flux2 modulation": subject("flux2", "lora_unet_final_layer_adaLN_modulation_1"),
    "wan with a gap": subject("wan", "lora_unet_blocks_0_self_attn_q", "lora_unet_blocks_2_self_attn_q", paths=BLOCKS),
    "stale metadata": subject("sd1", FORMS["diffusers"][0], spell=PEFT, metadata=STALE),
    "scale in the metadata": subject("flux1", "transformer.x_embedder", spell=PEFT, alphas=(1.0,)),
    "rank-stabilised": stabilised(),
    "norm_out": subject("flux1", "transformer.norm_out.linear", spell=PEFT),
    "q_norm.diff": subject("z-image", "lora_unet_layers_0_attention_qkv", more=("lora_unet_layers_0_attention_q_norm.diff",)),
    "magnitude": subject("flux1", "diffusion_model.img_in", spell=PEFT, more=("diffusion_model.img_in.magnitude",)),
    "sparse bias": subject("sd1", STEM, more=(f"{STEM}.bias_indices", f"{STEM}.bias_values")),
    "early lokr": early_lokr(),
    "split_qkv": subject("flux1", "lora_unet_double_blocks_0_img_attn_qkv", metadata={"ss_network_args": '{"split_qkv": "True"}'}),
    "peft folder": subject(None, "base_model.model.x", spell=PEFT, single=False),
    "base_model of sd": subject("sd1", "base_model.model.down_blocks.0.proj_in", spell=PEFT),
    "scaled loha": subject("sd1", STEM, algorithm="loha", alphas=(1.0,)),
    "boft without alpha": subject("sd1", STEM, algorithm="boft"),
}  # fmt: skip


@cache
def subjects() -> tuple[Subject, ...]:
    families = [None, *tables.family_ids()]
    plain = [form(name, family) for name, family in product(FORMS, families)]
    others = [form(name, family, algorithm) for name, family, algorithm in product(FORMS, families, TINY)]
    return (*plain, *others, *SPECIAL.values())


def fits(row: hosts._Row, host: str, one: Subject) -> bool:
    return row.fits(host, hosts.form_of(one.keys), next(iter(one.families), None), one)


def called(row: hosts._Row) -> str:
    return f"{'+'.join(sorted(row.hosts))}: {row.defect.text if row.defect else '/'.join(sorted(row.forms)) or 'yes'}"[
        :90
    ]


@pytest.mark.parametrize("row", TABLE.defects, ids=called)
def test_every_defect_shows_in_the_verdict_of_its_file(row: hosts._Row) -> None:
    for host in row.hosts:
        hit = [one for one in SPECIAL.values() if fits(row, host, one)] or [
            one for one in subjects() if fits(row, host, one)
        ]
        shown = [found for found in (verdict(one, host) for one in hit) if row.defect in found.defects]
        assert shown, f"no file shows it for {host}"
        assert all(found.reads in ("partly", "no") for found in shown)


@pytest.mark.parametrize("row", TABLE.reads, ids=called)
def test_every_reading_row_is_the_first_that_fits_some_file(row: hosts._Row) -> None:
    for host in row.hosts:
        mine = [other for other in TABLE.reads if host in other.hosts]
        earlier = mine[: mine.index(row)]
        chosen = (
            one for one in subjects() if fits(row, host, one) and not any(fits(other, host, one) for other in earlier)
        )
        assert next(chosen, None) is not None, f"no file meets this row first for {host}"


def test_every_fact_is_used_and_every_family_exists() -> None:
    rows = (*TABLE.reads, *TABLE.defects)
    assert set().union(*(row.facts | row.without for row in rows)) <= FACTS.keys()
    assert set().union(*(row.families | row.not_families for row in rows)) <= set(tables.family_ids())


def test_a_defect_names_a_thread_or_what_was_read_or_run() -> None:
    source = re.compile(r"[\w./-]+#\d+|.+, (source read|loaders read|run)")
    for row in (*TABLE.reads, *TABLE.defects):
        if row.defect is not None:
            assert source.fullmatch(row.defect.source), row.defect
            assert row.defect.text[0].islower() or row.defect.text.startswith(("LoHa", "LoKr", "SGM", "PEFT"))
            assert not row.defect.text.endswith(".")


def test_a_word_that_means_nothing_is_refused() -> None:
    with pytest.raises(TableError, match="means nothing"):
        hosts._row({"host": ["diffusers"], "reads": "perhaps"}, {})


@pytest.mark.parametrize(
    ("name", "host", "reads", "words"),
    [
        ("mixed alphas", "diffusers", "partly", "alphas differ"),
        ("mixed alphas", "comfyui", "yes", ""),
        ("an alpha missing", "diffusers", "partly", "without an alpha"),
        ("mixed names", "diffusers", "partly", "SGM half"),
        ("mixed names", "invokeai", "no", "all of one kind"),
        ("q and v alone", "diffusers", "no", "automatically infer"),
        ("no out_proj", "diffusers", "partly", "attention part is lost"),
        ("text_projection", "diffusers", "no", "text_projection"),
        ("dora per input", "diffusers", "partly", "dropped with a warning"),
        ("dora per output", "invokeai", "partly", "per input"),
        ("dora per input", "invokeai", "yes", ""),
        ("dora of wan", "diffusers", "no", "ValueError"),
        ("flux img_in", "diffusers", "partly", "filtered out in silence"),
        ("flux final layer", "diffusers", "partly", "alpha of final_layer"),
        ("onetrainer t5", "diffusers", "no", "assertion"),
        ("flux2 lora_down", "diffusers", "no", "empty adapter"),
        ("flux2 modulation", "diffusers", "partly", "swapped"),
        ("wan with a gap", "diffusers", "no", "KeyError"),
        ("stale metadata", "diffusers", "no", "other ranks"),
        ("scale in the metadata", "comfyui", "partly", "not read"),
        ("early lokr", "lycoris", "no", "flattened"),
        ("early lokr", "comfyui", "not known", ""),
        ("split_qkv", "comfyui", "partly", "a third"),
        ("peft folder", "peft", "yes", ""),
        ("te2 beside diffusers names", "hcp", "no", "end in an error"),
        ("te2 beside diffusers names", "forge", "yes", ""),
        ("te2 beside diffusers names", "diffsynth", "partly", "text encoders"),
        ("stale metadata", "forge", "no", ".processor."),
    ],
)  # fmt: skip
def test_known_bugs_are_told(name: str, host: str, reads: str, words: str) -> None:
    found = verdict(SPECIAL[name], host)
    assert found.reads == reads
    assert words in " ".join(defect.text for defect in found.defects)


def test_what_no_row_covers_is_not_known() -> None:
    unheard = subject(None, "some.module", spell=PEFT)
    assert {one.reads for one in verdicts(unheard)} == {"not known"}
    assert not any(one.defects for one in verdicts(unheard))


def test_two_candidates_that_a_host_treats_alike_have_one_verdict() -> None:
    both = Subject(form("kohya", "sd1").keys, form("kohya", "sd1").patches, ("sd1", "sd2"))
    assert verdict(both, "diffusers").reads == "yes"


def test_candidates_that_differ_are_not_decided() -> None:
    both = Subject(form("kohya", "sd1").keys, form("kohya", "sd1").patches, ("sd1", "sd3"))
    found = verdict(both, "diffusers")
    assert found.reads == "not known"
    assert "yes for sd1, no for sd3" in found.defects[0].text


def test_a_file_is_judged_by_its_keys(tmp_path: Path) -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn"
    tensors = {}
    for at, alpha in ((1, 1.0), (2, 4.0)):
        width = 320 if at == 1 else 768
        tensors |= {
            f"{stem}{at}_to_k.lora_down.weight": floats(4, width),
            f"{stem}{at}_to_k.lora_up.weight": floats(320, 4),
        }
        tensors |= {f"{stem}{at}_to_k.alpha": scalar(alpha)}
    found = verdicts(parse_file(open_file(write_safetensors(tmp_path / "a.safetensors", tensors))))
    assert found[0].host.id == "diffusers"
    assert (found[0].reads, found[0].defects[0].source) == ("partly", "diffusers 0.42.1, run")
    assert found[0].to_json()["checked"] == "run"
