"""The tables of whole checkpoints against the libraries: every published size, every configuration, every naming."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from hubtool.layouts import checkpoint_config as configs  # noqa: E402
from hubtool.layouts import checkpoint_tables as tables  # noqa: E402
from hubtool.layouts import vocabulary  # noqa: E402
from hubtool.layouts.checkpoint_names import Names  # noqa: E402
from hubtool.layouts.checkpoint_tables import Component, Pipeline  # noqa: E402
from hubtool.layouts.checkpoints import read, single_slots, write  # noqa: E402
from hubtool.tensors.dtypes import nbytes  # noqa: E402
from hubtool.tensors.expr import Expr, Read  # noqa: E402
from hubtool.tensors.ref import TensorRef  # noqa: E402

FAMILIES = tables.families()
VAES = {
    "AutoencoderKL": ("sd-vae", "flux1-vae"), "AutoencoderKLFlux2": ("flux2-vae",), "AutoencoderKLWan": ("wan21-vae",),
    "AutoencoderKLQwenImage": ("qwen-image-vae",), "AutoencoderKLHunyuanVideo": ("hunyuan-video-vae",),
}  # fmt: skip
Shapes = dict[str, tuple[int, ...]]
# fewer blocks or a class of their own: no configuration is written for them
WITHOUT = ("ssd1b-unet", "vega-unet", "wan21-14b-vace-transformer", "wan21-1.3b-vace-transformer")


def pipeline(family: str) -> Pipeline:
    found = tables.pipeline(family)
    assert found is not None
    return found


def tensors(shapes: Shapes) -> dict[str, Expr]:
    """Names and shapes without a byte behind them."""
    return {
        key: Read(TensorRef(key, "F16", shape, Path("none"), 0, nbytes("F16", shape))) for key, shape in shapes.items()
    }


def parameters(model: str) -> Shapes:
    modules = vocabulary.model(model)
    return {f"{path}.{name}" if path else name: shape for path, own in modules.items() for name, shape in own.items()}


def published() -> Iterator[tuple[str, str, str]]:
    for family in FAMILIES:
        for name, component in pipeline(family).components.items():
            models = VAES[component.cls] if name == "vae" else vocabulary.models(family, name)
            for model in models:
                if component.config and model not in WITHOUT and not name.endswith("transformer_2"):
                    yield family, name, model


def built(component: Component, config: dict[str, Any]) -> Shapes:
    """The state of the class made from our configuration, under published names."""
    import diffusers
    import transformers

    with torch.device("meta"):
        if component.library == "diffusers":
            model = getattr(diffusers, component.cls).from_config(config)
        else:
            cls = getattr(transformers, component.cls)
            model = cls(cls.config_class(**config))
    flat = component.cls == "CLIPTextModel"
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    state.pop("encoder.embed_tokens.weight", None)  # tied to `shared`
    return {f"text_model.{key}" if flat and not key.startswith("text_model.") else key: s for key, s in state.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "name", "model"), list(published()))
def test_a_configuration_makes_the_published_model(family: str, name: str, model: str) -> None:
    component, shapes = pipeline(family).components[name], parameters(model)
    config = json.loads(configs.dump(configs.component_config(component, tensors(shapes))))
    assert built(component, config) == shapes


@pytest.mark.parametrize("model", WITHOUT)
def test_no_configuration_is_written_where_the_tables_do_not_fit(model: str) -> None:
    family, name = ("sdxl", "unet") if model.endswith("unet") else ("wan", "transformer")
    assert configs.component_config(pipeline(family).components[name], tensors(parameters(model))) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_name_classes_that_exist(family: str) -> None:
    import diffusers

    table = pipeline(family)
    assert all(hasattr(diffusers, name) for name in (table.cls, *table.variants.values(), table.scheduler))
    denoiser = next(name for name in table.components if name in tables.DENOISERS)
    weights = tensors(parameters(vocabulary.models(family, denoiser)[0]))
    scheduler, config = getattr(diffusers, table.scheduler), configs.scheduler_config(table, weights)
    assert config.keys() - {"_class_name", "_diffusers_version"} <= scheduler._get_init_keys(scheduler)
    index = configs.model_index(table, {key: {} for key in table.components})
    cls = getattr(diffusers, table.cls)
    needed = set(cls._get_signature_keys(cls)[0]) - set(cls._optional_components)
    assert needed <= {key for key, value in index.items() if isinstance(value, list)}


@pytest.mark.parametrize("family", tables.tables.family_ids())
def test_every_published_size_is_renamed_there_and_back(family: str) -> None:
    table = tables.pipeline(family)
    denoiser = next((name for name in table.components if name in tables.DENOISERS), None) if table else None
    for model in vocabulary.models(family, denoiser or ""):
        assert table is not None
        assert denoiser is not None
        shapes = parameters(model)
        weights = {denoiser: tensors(shapes)}
        slots = single_slots(table, "", denoiser, tables.NATIVE)
        alone = tables.Form("alone", slots[:1])
        single = write(tables_checkpoint(family, weights), table, alone).tensors
        back = read(single, table, slots[:1])
        assert not back.extras
        assert {key: tensor.shape for key, tensor in back.weights[denoiser].items()} == shapes


def tables_checkpoint(family: str, weights: Any) -> Any:
    from hubtool.layouts.checkpoints import Checkpoint

    return Checkpoint(family, weights, {})


def spelled(family: str, name: str, naming: str, keys: list[str]) -> dict[str, str]:
    """canonical key -> outside key."""
    component = pipeline(family).components[name]
    names = Names(tables.rows(family, component, naming, reading=False), keys, inward=False)
    return {key: names.spot(key).key for key in keys}


def test_the_autoencoder_is_named_as_diffusers_converts_it() -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    keys = list(parameters("sd-vae"))
    names = spelled("sd1", "vae", "ldm", keys)
    shapes = parameters("sd-vae")
    squared = {key for key in keys if ".attentions." in key and len(shapes[key]) == 2}
    native = {
        f"first_stage_model.{names[key]}": torch.zeros(*shapes[key], *((1, 1) if key in squared else ()), device="meta")
        for key in keys
    }
    got = convert_ldm_vae_checkpoint(native, {"down_block_types": "1234", "up_block_types": "1234"})
    assert {key: tuple(value.shape) for key, value in got.items()} == shapes


def test_the_autoencoder_of_wan_is_named_as_diffusers_converts_it() -> None:
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    keys = list(parameters("wan21-vae"))
    names = spelled("wan", "vae", "native", keys)
    assert convert_wan_vae_to_diffusers({outside: key for key, outside in names.items()}) == {key: key for key in keys}


@pytest.mark.parametrize(
    ("family", "name", "model"), [("sdxl", "text_encoder_2", "clip-g"), ("sd2", "text_encoder", "clip-h")]
)
def test_an_open_clip_encoder_is_cut_as_diffusers_does(family: str, name: str, model: str) -> None:
    from types import SimpleNamespace

    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    unused = pipeline(family).components[name].unused
    shapes = {key: shape for key, shape in parameters(model).items() if not key.startswith(unused)}
    table = pipeline(family)
    component_slots = [slot for slot in table.forms[0].slots if slot.component == name]
    form = tables.Form("alone", tuple(component_slots))
    native = write(tables_checkpoint(family, {name: tensors(shapes)}), table, form).tensors
    states = {key: torch.empty(tensor.shape, device="meta") for key, tensor in native.items()}
    encoder = SimpleNamespace(config=SimpleNamespace(hidden_size=shapes["text_model.final_layer_norm.bias"][0]))
    got = convert_open_clip_checkpoint(encoder, states, prefix=component_slots[0].prefix)
    assert {key: tuple(value.shape) for key, value in got.items()} == shapes
