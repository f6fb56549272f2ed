"""Where to compute: devices that are not here are refused by every command in one way, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from click.testing import CliRunner  # noqa: E402

from hubtool.cli.main import cli  # noqa: E402
from hubtool.errors import UsageProblem  # noqa: E402
from hubtool.tensors import device  # noqa: E402
from tests.support import adapters  # noqa: E402
from tests.support.checkpoints import single  # noqa: E402


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs, as far as torch tells."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:1"])
@pytest.mark.usefixtures("gpus")
def test_devices_that_are_here_are_taken(name: str) -> None:
    device.check_device(name)


@pytest.mark.parametrize("name", ["cuda:2", "tpu", "", "cuda:x", "CPU"])
@pytest.mark.usefixtures("gpus")
def test_a_device_that_is_not_here_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(UsageProblem) as error:
        device.check_device(name)
    assert error.value.hint == "this machine has cpu, cuda:0, cuda:1"


def test_without_a_gpu_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageProblem, match="'cuda'"):
        device.check_device("cuda")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    single("sd1", folder)
    adapters.write(adapters.make("sd1", ranks=(4,)), folder / "x.safetensors", "kohya")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge", "x.safetensors", "x.safetensors"],
        ["merge", "sd1.safetensors", "sd1.safetensors"],
        ["resize", "x.safetensors", "--rank", "2"],
        ["collapse", "sd1.safetensors", "x.safetensors"],
        ["extract", "sd1.safetensors", "sd1.safetensors", "--rank", "2"],
    ],
    ids=["merge adapters", "merge checkpoints", "resize", "collapse", "extract"],
)
def test_every_command_refuses_it_in_the_same_words_and_writes_nothing(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(models)
    monkeypatch.setenv("HUBTOOL_LIBRARY", str(tmp_path / "none.sqlite3"))
    out = tmp_path / "out.safetensors"
    found: Any = CliRunner().invoke(cli, [*arguments, "--device", "cuda:9", "-o", str(out)])
    assert (found.exit_code, type(found.exception)) == (2, SystemExit)
    assert "torch cannot compute on 'cuda:9' here" in found.stderr
    assert "this machine has cpu" in found.stderr
    assert list(tmp_path.iterdir()) == []
