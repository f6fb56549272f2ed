"""``Client``: huggingface_hub with an endpoint, a token that stays home, time limits, and failures in words.

The token goes to the origin of the endpoint and nowhere else: not to the storage a download is redirected to, and not over plain HTTP to
another machine. No object here shows it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote, urljoin

from hubtool.errors import HubError, MissingExtra
from hubtool.hub.errors import explained, may_carry_token
from hubtool.hub.refs import HUGGING_FACE, HubRef, safe_path
from hubtool.hub.retrying import Sleep, origin, retried

T = TypeVar("T")
_REDIRECTS = 10
_CONNECT_SECONDS = 10.0
_ANSWER_SECONDS = 120.0  # a commit of many files takes the Hub up to a minute
_MAX_ERROR = 64 << 10
_SMALL_TRIES = 3


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a repository as the hub lists it. ``oid``: git blob sha1. ``sha256``: of a file in LFS or Xet, else None."""

    path: str
    size: int
    oid: str = ""
    sha256: str | None = None
    xet: str | None = None

    @property
    def digest(self) -> str:
        """What the content must hash to: the SHA256, or the git blob sha1 of a file without one."""
        return self.sha256 or self.oid


@dataclass(frozen=True, slots=True)
class Resolved:
    """A reference with its revision pinned to a commit. ``local``: no hub was asked, the local cache knew."""

    ref: HubRef
    revision: str
    local: bool = False
    private: bool = False
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        return self.ref.branch


def endpoint_of(given: str | None = None) -> str:
    """The hub to talk to: the one given, that of HF_ENDPOINT, or Hugging Face."""
    return (given or os.environ.get("HF_ENDPOINT") or HUGGING_FACE).rstrip("/")


class Client:
    """One hub. ``token``: None for the stored one, False for none. Raises ``MissingExtra`` without huggingface_hub."""

    def __init__(
        self, endpoint: str | None = None, token: str | bool | None = None, *, sleep: Sleep = time.sleep
    ) -> None:
        self.endpoint = endpoint_of(endpoint)
        self.sleep = sleep
        self._token = _token_for(self.endpoint, token)
        self._api: Any = None
        _set_time_limits()

    def __repr__(self) -> str:
        return f"Client({self.endpoint!r}, token={'***' if self._token else None})"

    @property
    def api(self) -> Any:
        """huggingface_hub's ``HfApi`` for this endpoint and token."""
        if self._api is None:
            from huggingface_hub import HfApi

            self._api = HfApi(
                endpoint=self.endpoint, token=self._token, library_name="hubtool", library_version=_version()
            )
        return self._api

    @property
    def has_token(self) -> bool:
        """Whether requests to the endpoint carry a token."""
        return bool(self._token)

    def headers(self, url: str) -> dict[str, str]:
        """Headers of a request to ``url``: the token only where it belongs."""
        from huggingface_hub.utils import build_hf_headers

        at_home = origin(url) == origin(self.endpoint)
        built = build_hf_headers(
            token=self._token if at_home else False, library_name="hubtool", library_version=_version()
        )
        return dict(built)

    def ask(self, ref: HubRef | None, function: Callable[[], T]) -> T:
        """The answer of a call that only reads, tried again while failures pass. Raises ``HubError`` in words."""
        with explained(ref, self.endpoint):
            return retried(function, self.endpoint, self.sleep)

    def resolve(self, ref: HubRef) -> Resolved:
        """Ask which commit a revision is now, once: everything after uses that commit. Raises ``HubError``."""
        info = self.ask(ref, lambda: self.api.model_info(ref.repo, revision=ref.revision, timeout=_CONNECT_SECONDS))
        commit = str(info.sha)
        card = info.card_data.to_dict() if info.card_data is not None else {}
        return Resolved(ref.at(commit), ref.branch, private=bool(info.private), card=card)

    def tree(self, ref: HubRef) -> list[Entry]:
        """Every file of a repository with size and hashes, in one listing. Raises ``HubError``, ``UnsafeFile`` for a name that escapes."""
        listed = self.ask(
            ref, lambda: list(self.api.list_repo_tree(ref.repo, recursive=True, revision=ref.revision or "main"))
        )
        return [_entry(item, ref) for item in listed if hasattr(item, "blob_id")]

    def address(self, ref: HubRef, path: str) -> str:
        """Where the content of a file is asked for."""
        return f"{self.endpoint}/{ref.repo}/resolve/{quote(ref.branch, safe='')}/{quote(path)}"

    @contextmanager
    def stream(
        self, ref: HubRef, path: str, *, start: int = 0, stop: int | None = None, etag: str | None = None
    ) -> Iterator[Any]:
        """One answer with (a range of) a file's content, redirects followed by hand; nothing of it is read yet.

        ``etag``: of the answer that an earlier part came from (If-Range). Raises what huggingface_hub raises.
        """
        more = {"accept-encoding": "identity"}
        if start or stop is not None:
            more["range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
            if etag:
                more["if-range"] = etag
        url = self.address(ref, path)
        for _ in range(_REDIRECTS):
            with self._opened(url, more) as response:
                if not response.has_redirect_location:
                    _raise_for_status(response)
                    yield response
                    return
                url = _target(url, response.headers["location"])
        raise HubError(f"the hub redirects {path} in a circle", hint="check HF_ENDPOINT and the proxy")

    def _opened(self, url: str, more: Mapping[str, str]) -> Any:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session, httpx

        limits = httpx.Timeout(constants.HF_HUB_DOWNLOAD_TIMEOUT, connect=_CONNECT_SECONDS)
        headers = {**self.headers(url), **more}
        return get_session().stream("GET", url, headers=headers, follow_redirects=False, timeout=limits)

    def read(self, ref: HubRef, entry: Entry, limit: int) -> bytes:
        """A small file, verified. Raises ``HubError`` for one of more than ``limit`` bytes, or of other content than listed."""
        from hubtool.hub.checking import Checker

        if entry.size > limit:
            raise HubError(f"{entry.path} has {entry.size} bytes, more than the {limit} expected", hint=f"see {ref}")
        data = self.ask(ref, lambda: self._whole(ref, entry))
        if Checker(entry).of(data) != entry.digest:
            raise HubError(
                f"{entry.path} came with other content than the hub lists", hint="run the same command again"
            )
        return data

    def _whole(self, ref: HubRef, entry: Entry) -> bytes:
        data = bytearray()
        with self.stream(ref, entry.path) as response:
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > entry.size:
                    break
        return bytes(data)


def _version() -> str:
    from hubtool.version import __version__

    return __version__


def _token_for(endpoint: str, token: str | bool | None) -> str | bool:
    """The token to send to ``endpoint``; False for none. Never one over plain HTTP to another machine."""
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        raise MissingExtra("talking to a hub", "hub") from None
    if isinstance(token, str):
        found: str | None = token
    else:
        hidden = token is False or (token is None and constants.HF_HUB_DISABLE_IMPLICIT_TOKEN)
        found = None if hidden else get_token()
    return found if found and may_carry_token(endpoint) else False


def _set_time_limits() -> None:
    """huggingface_hub waits forever by default. A client of the caller's own making is left alone."""
    from huggingface_hub.utils import _http, httpx, set_client_factory

    made: Any = _http.default_client_factory
    current: Any = getattr(_http, "_GLOBAL_CLIENT_FACTORY", None)
    if current != made:
        return

    def limited() -> Any:
        client = made()
        client.timeout = httpx.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS)
        return client

    set_client_factory(limited)


def _entry(item: Any, ref: HubRef) -> Entry:
    digest = item.lfs.sha256 if item.lfs is not None else None
    return Entry(safe_path(item.path, ref), int(item.size), item.blob_id, digest, getattr(item, "xet_hash", None))


def _target(url: str, location: str) -> str:
    """Where a redirect leads. Raises ``HubError`` for one that would go on without encryption."""
    found = urljoin(url, location)
    if origin(url)[0] == "https" and origin(found)[0] != "https":
        raise HubError("the hub redirects to an unencrypted address", hint="check HF_ENDPOINT and the proxy")
    return found


def _raise_for_status(response: Any) -> None:
    from huggingface_hub.utils import hf_raise_for_status

    if response.status_code < 400:
        return
    length = response.headers.get("content-length", "")
    if length.isdigit() and int(length) <= _MAX_ERROR:
        response.read()
    hf_raise_for_status(response)
