"""Civitai as a hub that only tells: what is known about a file by its hash. Nothing is sent but hashes; no token is ever used.

``POST /model-versions/by-hash`` takes at most 100 SHA256 digests and answers with the published versions that hold such a file, in its own
order, unknown ones left out; ``GET /model-versions/by-hash/{hash}`` takes any kind of hash and answers 404 for an unknown one
(developer.civitai.com/site/reference/model-versions; civitai/civitai src/pages/api/v1/model-versions/by-hash). Limits are not published:
a few requests a second, half as many after every 429, and Retry-After is obeyed.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from hubtool.errors import HubError, UsageProblem
from hubtool.tensors.strict_json import JsonError, loads_config
from hubtool.version import __version__

SWITCH = "HUBTOOL_CIVITAI"
ENDPOINT = "https://civitai.com/api/v1"
BATCH = 100  # "Too many hashes" above it
PER_SECOND = 2.0
TRIES = 5
LONGEST_WAIT = 120.0  # seconds; a server that asks for more is left alone
MAX_BODY = 64 << 20
MAX_DEPTH = 64
_TIMEOUT = 30.0
_OFF = frozenset({"", "0", "no", "off", "false"})
_BAD_SPLIT = frozenset({400, 413, 414})


def enabled() -> bool:
    """Whether the person's settings turn Civitai on (``HUBTOOL_CIVITAI``); it is off by default."""
    return os.environ.get(SWITCH, "").strip().lower() not in _OFF


def endpoint() -> str:
    """The base URL of the API: Civitai's own, or the one that ``HUBTOOL_CIVITAI`` names. Raises UsageProblem."""
    named = os.environ.get(SWITCH, "").strip()
    if "://" not in named:
        return ENDPOINT
    parts = urlsplit(named)
    if parts.scheme not in ("https", "http") or not parts.hostname or "@" in parts.netloc:
        raise UsageProblem(f"{SWITCH} is not the address of an API", hint=f"{SWITCH}=1, or {SWITCH}={ENDPOINT}")
    return named.rstrip("/")


@dataclass(frozen=True, slots=True)
class Version:
    """A model version: ``raw`` is its JSON exactly as received, ``document`` the same parsed."""

    raw: bytes
    document: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Response:
    status: int
    wait: float | None  # seconds that Retry-After asks for
    body: bytes
    location: str = ""


class Pace:
    """Spaces requests out. ``slower`` halves the rate for the rest of the run."""

    def __init__(
        self,
        per_second: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.interval = 1.0 / per_second
        self._clock, self._sleep = clock, sleep
        self._next = 0.0

    def wait(self) -> None:
        """Return when the next request may go out."""
        now = self._clock()
        if now < self._next:
            self._sleep(self._next - now)
        self._next = max(now, self._next) + self.interval

    def pause(self, seconds: float) -> None:
        self._sleep(seconds)

    def slower(self) -> None:
        self.interval = min(self.interval * 2, LONGEST_WAIT)


class Civitai:
    """A client of the public API. Every method raises HubError when there is no answer; "not known" is an answer."""

    def __init__(self, base: str | None = None, *, pace: Pace | None = None) -> None:
        self.base = base or endpoint()
        self.pace = pace or Pace(PER_SECOND)
        self._opener = urllib.request.build_opener(_NoRedirects)

    def versions(self, digests: Sequence[str]) -> Iterator[tuple[Sequence[str], list[Version]]]:
        """For each batch of SHA256 digests: the batch, and every version that the answer holds. Keep each before asking for the next."""
        for at in range(0, len(digests), BATCH):
            yield from self._batch(digests[at : at + BATCH])

    def _batch(self, digests: Sequence[str]) -> Iterator[tuple[Sequence[str], list[Version]]]:
        body = json.dumps([digest.upper() for digest in digests]).encode()
        found, status = self._ask("POST", "/model-versions/by-hash", body, allowed=_BAD_SPLIT)
        if status == 200:
            yield digests, found
        elif len(digests) == 1:
            raise HubError(f"{self.host} refuses to look up {digests[0]} (HTTP {status})")
        else:
            yield from self._batch(digests[: len(digests) // 2])
            yield from self._batch(digests[len(digests) // 2 :])

    def version(self, digest: str) -> Version | None:
        """The version that holds a file with this hash of any kind (SHA256, AutoV2, AutoV3, BLAKE3, CRC32); None where none is known."""
        path = f"/model-versions/by-hash/{quote(digest, safe='')}"
        found, status = self._ask("GET", path, None, allowed=frozenset({404}))
        return found[0] if status == 200 and found else None

    @property
    def host(self) -> str:
        return urlsplit(self.base).netloc

    def _ask(self, method: str, path: str, body: bytes | None, *, allowed: frozenset[int]) -> tuple[list[Version], int]:
        """The versions in the answer and its status: 200, or one that is ``allowed``. What may pass is tried again."""
        last = _Again("no answer")
        for attempt in range(TRIES):
            self.pace.wait()
            try:
                return self._once(method, path, body, allowed)
            except _Again as again:
                last = again
            if attempt + 1 < TRIES:
                self.pace.pause(_backoff(attempt) if last.wait is None else last.wait)
        raise HubError(f"{self.host} does not answer: {last.problem}", hint="try again later; what was learnt is kept")

    def _once(self, method: str, path: str, body: bytes | None, allowed: frozenset[int]) -> tuple[list[Version], int]:
        try:
            response = self._send(method, path, body)
        except (OSError, http.client.HTTPException) as error:
            raise _Again(_reason(error)) from error
        if response.status in allowed:
            return [], response.status
        if response.status != 200:
            raise self._problem(response)
        try:
            return read(response.body), 200
        except JsonError as error:
            raise _Again(f"its answer is not what the API documents ({error})") from error

    def _problem(self, response: _Response) -> Exception:
        """What a status other than 200 means: try again, or give up with the reason."""
        if 300 <= response.status < 400:
            moved = urlsplit(response.location).netloc or "another address"
            hint = f"if you trust it: {SWITCH}=https://{moved}/api/v1"
            return HubError(f"{self.host} sends its visitors on to {moved}; hubtool does not follow", hint=hint)
        if response.status == 429:
            self.pace.slower()
        elif response.status < 500:
            return HubError(f"{self.host} refuses the request (HTTP {response.status})")
        if response.wait is not None and response.wait > LONGEST_WAIT:
            problem = f"{self.host} asks for a pause of {response.wait:.0f} seconds"
            return HubError(problem, hint="try again after that; what was learnt is kept")
        return _Again(f"HTTP {response.status}", response.wait)

    def _send(self, method: str, path: str, body: bytes | None) -> _Response:
        headers = {"Accept": "application/json", "User-Agent": f"hubtool/{__version__}"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        request = urllib.request.Request(self.base + path, body, headers, method=method)
        try:
            answer = self._opener.open(request, timeout=_TIMEOUT)
        except urllib.error.HTTPError as error:
            answer = error
        with closing(answer):
            wait = retry_after(answer.headers.get("Retry-After"))
            return _Response(answer.status, wait, _body(answer), answer.headers.get("Location", ""))


class _Again(Exception):
    """The request may work in a while. ``wait``: seconds, where the server said so."""

    def __init__(self, problem: str, wait: float | None = None) -> None:
        super().__init__(problem)
        self.problem, self.wait = problem, wait


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer: the hashes of a person's files go to the host they named, to no other."""

    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


def _body(answer: Any) -> bytes:
    content: bytes = answer.read(MAX_BODY + 1)
    if len(content) > MAX_BODY:
        raise HubError(f"the answer is larger than {MAX_BODY >> 20} MiB")
    said = answer.headers.get("Content-Length", "")
    if said.isdigit() and len(content) < int(said):
        raise http.client.IncompleteRead(content, int(said) - len(content))
    return content


def _reason(error: BaseException) -> str:
    """One line for a failure of the network."""
    cause = getattr(error, "reason", error)
    return str(cause) or type(cause).__name__


def _backoff(attempt: int) -> float:
    return min(30.0, 2.0**attempt) * random.uniform(0.5, 1.0)


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks to wait: a number or a date."""
    if not value:
        return None
    if value.strip().isdigit():
        return float(value.strip()[:9])
    try:
        then = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, then.timestamp() - time.time())


def read(body: bytes) -> list[Version]:
    """The versions of an answer, one object or a list of them, each with its own bytes. Raises JsonError."""
    document = loads_config(body, max_depth=MAX_DEPTH)
    if isinstance(document, dict) and "id" in document:
        return [Version(body, document)]
    if not isinstance(document, list) or not all(isinstance(item, dict) for item in document):
        raise JsonError("neither a model version nor a list of them")
    return [Version(raw, item) for raw, item in zip(_items(body.decode("utf-8-sig")), document, strict=True)]


def _items(text: str) -> Iterator[bytes]:
    """The source text of each item of a JSON list."""
    decoder = json.JSONDecoder()
    at = text.index("[") + 1
    while True:
        while text[at] in " \t\r\n,":
            at += 1
        if text[at] == "]":
            return
        _, end = decoder.raw_decode(text, at)
        yield text[at:end].encode("utf-8", "surrogatepass")
        at = end
