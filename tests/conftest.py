"""Shared fixtures. Every test runs offline, with a library of its own and one torch thread."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

CHECKOUT = Path(__file__).resolve().parent.parent
_LOOPBACK = ("127.", "localhost", "::1")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real fixture files that lies outside the checkout. Tests that need it are skipped without it."""
    root = Path(os.environ.get("HUBTOOL_SHARED") or CHECKOUT.parent / "shared")
    fixtures = root / "fixtures"
    if not fixtures.is_dir():
        pytest.skip("the folder of real files is not here (set HUBTOOL_SHARED)")
    return fixtures


@pytest.fixture(autouse=True)
def _own_library(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("library")
    monkeypatch.setenv("HUBTOOL_LIBRARY", str(folder / "library.sqlite3"))
    monkeypatch.setenv("HUBTOOL_CACHE", str(folder / "cache"))


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else "127."
        if not str(host).startswith(_LOOPBACK):
            raise AssertionError(f"a test tried to reach {host}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
