"""When a failed request is worth another try, and how long to wait for it. A hub that says how long is believed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from hubtool.hub.errors import failures, names_of, status_of, wait_of

T = TypeVar("T")
Sleep = Callable[[float], None]
ATTEMPTS = 6
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_FIRST_WAIT = 0.5
_LONGEST_WAIT = 8.0
_MOST_PATIENCE = 330.0  # a whole window of the Hub's rate limits
# Attempts where waiting long helps nobody: nothing listens, or what answers may be a sign-in page.
_FEW = {"ConnectError": 2, "JSONDecodeError": 3, "UnicodeDecodeError": 3}
_GARBLED = frozenset({"TransportError", "BrokenAnswer", "JSONDecodeError", "UnicodeDecodeError"})


def origin(url: str) -> tuple[str, str, int]:
    """(scheme, host, port) of an address: what a token may not leave."""
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    return scheme, (parts.hostname or "").lower(), parts.port or {"http": 80, "https": 443}.get(scheme, 0)


def is_passing(error: BaseException, endpoint: str) -> bool:
    """Whether the same request may work in a moment."""
    status = status_of(error)
    if status is None:
        names = names_of(error)
        return bool(names & _GARBLED) and not names & {"UnsupportedProtocol", "ProxyError"}
    if status in (403, 404):  # the storage's signed address has run out: the hub gives a new one
        return origin(str(getattr(error, "response").url)) != origin(endpoint)  # noqa: B009  (no such attribute, to mypy)
    return status in _PASSING


class BrokenAnswer(OSError):
    """An answer that is not what was asked for: a piece too few, too many, or another. Another try may be better."""


class Tries:
    """Counts what went wrong on the way to one result. ``again`` waits, or says by raising that there is no point in it."""

    def __init__(self, endpoint: str, sleep: Sleep = time.sleep, attempts: int = ATTEMPTS) -> None:
        self._endpoint = endpoint
        self._sleep = sleep
        self._attempts = attempts
        self._failed = 0

    def progressed(self) -> None:
        """Something has come through: earlier failures are forgiven."""
        self._failed = 0

    def again(self, error: BaseException) -> None:
        """Wait for the next try. Raises ``error`` when it is no passing one, or has come too often."""
        self._failed += 1
        allowed = min([self._attempts, *(_FEW[name] for name in names_of(error) & _FEW.keys())])
        if not is_passing(error, self._endpoint) or self._failed >= allowed:
            raise error
        self._sleep(self._wait(error))

    def _wait(self, error: BaseException) -> float:
        response = getattr(error, "response", None)
        asked = wait_of(response.headers) if response is not None else None
        if asked is None:
            return min(_LONGEST_WAIT, _FIRST_WAIT * 2**self._failed) * random.uniform(0.5, 1.0)
        if asked > _MOST_PATIENCE:
            raise error
        return asked + 0.1


def retried(function: Callable[[], T], endpoint: str, sleep: Sleep = time.sleep) -> T:
    """Call a function that only reads until it works. Raises what huggingface_hub raises."""
    tries = Tries(endpoint, sleep)
    while True:
        try:
            return function()
        except failures() as error:
            tries.again(error)
