"""A Hub of our own for a test: a running server, a fresh HF_HOME, and the client pointed at them. Loopback only.

    pytest_plugins = ["tests.support.hub"]

    def test_a_file_is_pulled(hub): hub.put("tester/style", {"a.safetensors": data}); ...

Tokens: ``hf_testtoken`` (tester, writes; the one that is set), ``hf_readtoken`` (tester, reads), ``hf_othertoken`` (other, writes).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.hub_server import Hub

TOKEN = "hf_testtoken"
CHECKOUT = Path(__file__).resolve().parent.parent.parent
Content = bytes | str | Path


class LocalHub(Hub):  # type: ignore[misc]  # the server is untyped
    """The server with what tests need around it. ``fault``, ``log``, ``leaked_tokens``, ``clear``: see ``hub_server``."""

    def __init__(self, data: Path, home: Path, **options: Any) -> None:
        super().__init__(str(data), **options)
        self.home = home

    def put(
        self,
        repo: str,
        files: Mapping[str, Content],
        *,
        private: bool = False,
        gated: bool = False,
        branch: str = "main",
    ) -> str:
        """Commit files straight into the store (no HTTP, no xet) and return the commit; the repo is made if need be."""
        owner = repo.split("/", maxsplit=1)[0]
        with self.store.lock:
            found = self.store.repos.get(("model", repo)) or self.store.new_repo("model", repo, owner)
            found["private"], found["gated"] = private, "manual" if gated else False
            head = found["branches"].get(branch) or found["branches"]["main"]
            entries = {name: self._entry(name, content) for name, content in files.items()}
            merged = {**found["commits"][head]["files"], **entries}
            return str(self.store.commit(found, branch, merged, "put", "", owner, [head]))

    def _entry(self, name: str, content: Content) -> dict[str, Any]:
        data = (
            content.read_bytes()
            if isinstance(content, Path)
            else content.encode()
            if isinstance(content, str)
            else content
        )
        if name.endswith((".md", ".json", ".txt", ".gitattributes")):
            return dict(self.store.put_blob(data))
        digest = hashlib.sha256(data).hexdigest()
        Path(self.store.path("lfs", digest)).write_bytes(data)
        return dict(self.store.lfs_entry(digest, len(data)))

    def api(self, token: str | bool = TOKEN) -> Any:
        """huggingface_hub's own client, pointed here."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.url, token=token)

    def upload(self, repo: str, files: Mapping[str, bytes]) -> str:
        """Commit files with the real client: over xet, unless it is off. Returns the commit."""
        from huggingface_hub import CommitOperationAdd

        api = self.api()
        api.create_repo(repo, exist_ok=True)
        sources = []
        for at, (name, data) in enumerate(files.items()):
            source = self.home / f"upload-{at}"  # paths, not bytes: the client sends bytes around xet
            source.write_bytes(data)
            sources.append(CommitOperationAdd(name, str(source)))
        return str(api.create_commit(repo, sources, commit_message="upload").oid)

    def head(self, repo: str, branch: str = "main") -> str:
        return str(self.store.repos[("model", repo)]["branches"][branch])

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """Every file of a branch, as the server holds it."""
        found = self.store.repos[("model", repo)]
        entries = found["commits"][found["branches"][branch]]["files"]
        return {name: self.store.read(entry) for name, entry in entries.items()}

    def commits(self, repo: str, branch: str = "main") -> list[str]:
        """Titles of a branch's commits, newest first."""
        found = self.store.repos[("model", repo)]
        return [commit["title"] for commit in self.store.history(found, found["branches"][branch])]

    def environment(self, **more: str) -> dict[str, str]:
        """Variables for a program of its own."""
        kept = {
            name: value for name, value in os.environ.items() if name not in {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"}
        }
        return {**kept, "PYTHONPATH": str(CHECKOUT), "NO_COLOR": "1", **more}

    def run(self, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """``hubtool ARGS`` as a user starts it, in a process of its own."""
        command = [sys.executable, "-m", "hubtool", *args]
        return subprocess.run(
            command, env=self.environment(**variables), capture_output=True, text=True, timeout=120, check=False
        )


def point(
    monkeypatch: pytest.MonkeyPatch, url: str, home: Path, token: str | None = TOKEN, *, xet: bool = True
) -> None:
    """Point this process and its children at an endpoint. huggingface_hub read the environment when it was imported."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http, _xet, close_session

    home.mkdir(parents=True, exist_ok=True)
    variables = {
        "HF_ENDPOINT": url, "HF_HOME": home, "HF_HUB_CACHE": home / "hub", "HF_XET_CACHE": home / "xet",
        "HF_TOKEN_PATH": home / "token", "HF_STORED_TOKENS_PATH": home / "stored_tokens", "HF_ASSETS_CACHE": home / "assets",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
        if hasattr(constants, name):
            monkeypatch.setattr(constants, name, str(value))
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(_http, "_HUB_ORIGINS", frozenset({_http._url_origin(url)}))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hasty = {**vars(time), "sleep": lambda seconds: time.sleep(min(seconds, 0.02))}
    monkeypatch.setattr(_http, "time", SimpleNamespace(**hasty))  # its own retries wait seconds
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", str(int(not xet)))
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    _xet.abort_xet_session()  # it keeps the cache folder of the test before
    close_session()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A running Hub; HF_ENDPOINT, HF_HOME and HF_TOKEN lead to it. Any token that reached the storage host fails the test."""
    with LocalHub(tmp_path / "hub-data", tmp_path / "hub-home") as running:
        point(monkeypatch, running.url, running.home)
        yield running
        assert not running.leaked_tokens()


@pytest.fixture(params=[False, True], ids=["lfs", "xet"])
def hub_both(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """``hub`` twice: with xet off and on."""
    with LocalHub(tmp_path / "hub-data", tmp_path / "hub-home") as running:
        point(monkeypatch, running.url, running.home, xet=request.param)
        yield running
        assert not running.leaked_tokens()
