"""Every failure of a hub as one sentence with its cause, and the command or page that helps.

huggingface_hub raises some thirty classes, and lets httpx's own and builtin ones through (a TCP reset is a ``ReadError``, a wrong size a
plain ``OSError``, a refused card a plain ``ValueError``). Classes are known by name here, in every release of the client since 1.0.
Nothing that goes out of here holds a token.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from hubtool.errors import FileError, HubError, HubtoolError
from hubtool.hub.refs import HUGGING_FACE, HubRef

_SECRETS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "hf_***"),
    (re.compile(r"(?i)\b(bearer)\s+[\w.~+/=:-]+"), r"\1 ***"),
    (re.compile(r"(?i)\b((?:api_?key|access_?token|token|sig|signature|x-amz-[a-z-]+)=)[^&\s\"']+"), r"\1***"),
    (re.compile(r"(https?://)[^/@\s]+@"), r"\1***@"),
)
_LOOPBACK = re.compile(r"localhost|127\.\d+\.\d+\.\d+|::1")
_MAX_SAID = 300
_LOGIN = "hf auth login"
_XET_TOKEN = re.compile(r"xet-(?:read|write)-token|/xet/")


@dataclass(frozen=True, slots=True)
class Case:
    """What is known about a failure when it is put into words."""

    error: BaseException
    ref: HubRef | None
    endpoint: str
    offline: bool

    @property
    def repo(self) -> str:
        return self.ref.repo if self.ref else "the repository"

    @property
    def shown(self) -> str:
        return str(self.ref) if self.ref else "what was asked for"

    @property
    def page(self) -> str:
        return f"{self.endpoint}/{self.ref.repo}" if self.ref else self.endpoint

    @property
    def status(self) -> int | None:
        return status_of(self.error)

    @property
    def said(self) -> str:
        """The server's own words, safe to print."""
        text = getattr(self.error, "server_message", None) or str(self.error)
        return redact(" ".join(str(text).split()))[:_MAX_SAID] or type(self.error).__name__


Said = tuple[str, str]  # (what happened and why, what to do)


def redact(text: str) -> str:
    """``text`` without anything that could be a secret: tokens, keys, signatures in addresses, and the very token in use."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "CIVITAI_API_KEY"):
        value = os.environ.get(name, "").strip()
        if len(value) >= 6:
            text = text.replace(value, "***")
    for pattern, stars in _SECRETS:
        text = pattern.sub(stars, text)
    return text


def may_carry_token(endpoint: str) -> bool:
    """Whether a token may travel to this hub: encrypted, or without leaving this machine."""
    parts = urlsplit(endpoint)
    return parts.scheme.lower() == "https" or _LOOPBACK.fullmatch(parts.hostname or "") is not None


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an exception carries, if it does."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def names_of(error: BaseException) -> frozenset[str]:
    """The names of an exception's class and of its bases."""
    return frozenset(kind.__name__ for kind in type(error).__mro__)


def is_unreachable(error: BaseException) -> bool:
    """Whether no hub answered (or only its failing front): what a local copy can stand in for."""
    names, status = names_of(error), status_of(error)
    if status is not None:
        return status >= 500 or status in (408, 429)
    return bool(names & {"OfflineModeIsEnabled", "TransportError", "LocalEntryNotFoundError", "ConnectionError"})


def failures() -> tuple[type[BaseException], ...]:
    """What calls of huggingface_hub and hf_xet may raise: for ``except failures() as error: raise explain(error, ref)``."""
    from huggingface_hub import errors

    bases = {base for base in errors.HfHubHTTPError.__mro__ if base.__name__ in ("HTTPError", "HfHubHTTPError")}
    named = ("EntryNotFoundError", "RevisionResolutionError", "NotASafetensorsRepoError", "SafetensorsParsingError")
    more = ("XetDownloadError", "FileDuplicationError", "CachedRepoTreeNotFoundError", "OIDCError", "DeviceCodeError")
    ours = tuple(getattr(errors, name) for name in (*named, *more) if hasattr(errors, name))
    return (*bases, *ours, OSError, ValueError, RuntimeError)


@contextmanager
def explained(ref: HubRef | None, endpoint: str = HUGGING_FACE) -> Iterator[None]:
    """Turn whatever a hub raises inside the block into ``explain``'s error. hubtool's own errors pass."""
    try:
        yield
    except HubtoolError:
        raise
    except failures() as error:
        raise explain(error, ref, endpoint) from error


def explain(error: BaseException, ref: HubRef | str | None = None, endpoint: str = HUGGING_FACE) -> HubtoolError:
    """``error`` as one sentence and a way out: a ``HubError`` (exit code 6), or a ``FileError`` for this machine's own disk.

    ``ref``: what was asked for, a reference or ``owner/name``.
    """
    if isinstance(error, HubtoolError):
        return error
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return FileError(redact(error.strerror or str(error)), path=os.fsdecode(error.filename))
    case = Case(error, _as_ref(ref), endpoint.rstrip("/"), _offline())
    message, hint = _words(case)
    if (case.status in (401, 403) or message == _no_repository(case)[0]) and not may_carry_token(case.endpoint):
        hint = "no token is sent over plain http: set HF_ENDPOINT to the https:// address of this hub"
    return HubError(redact(message), hint=redact(hint))


def _as_ref(ref: HubRef | str | None) -> HubRef | None:
    if not isinstance(ref, str):
        return ref
    owner, _, name = ref.partition("/")
    return HubRef(owner, name)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _words(case: Case) -> Said:
    names = names_of(case.error)
    for name, said in _BY_CLASS:
        if name in names:
            return said(case)
    status = case.status
    if status is not None:
        return _BY_STATUS.get(status, _by_range)(case)
    return next((said(case) for name, said in _BROKEN if name in names), _unknown(case))


def _gated(case: Case) -> Said:
    asked = f"ask for access at {case.page}"
    if case.status == 401:
        return f"{case.repo} is gated, and no token was sent", f"{asked}, then: {_LOGIN}"
    return f"{case.repo} is gated: its owner has not let this account in", f"{asked}; with another account: {_LOGIN}"


def _no_repository(case: Case) -> Said:
    said = f"{case.repo} does not exist, or is private and closed to this account"
    return said, f"check the name at {case.page}; if it is private: {_LOGIN}"


def _no_revision(case: Case) -> Said:
    revision = case.ref.branch if case.ref else "that revision"
    return f"{case.repo} has no revision {revision}", f"see {case.page}/commits, or leave the revision out for main"


def _no_file(case: Case) -> Said:
    path = case.ref.path if case.ref and case.ref.path else "that file"
    revision = case.ref.branch[:12] if case.ref else "this revision"
    return f"{case.repo} has no file {path} at {revision}", f"hubtool inspect hf://{case.repo} lists what is there"


def _not_local(case: Case) -> Said:
    if case.offline:
        return _is_offline(case)
    said = f"the hub at {case.endpoint} did not answer, and the local cache does not hold {case.shown}"
    return said, "check the connection and HF_ENDPOINT, then run the same command again: it goes on where it stopped"


def _is_offline(case: Case) -> Said:
    return f"HF_HUB_OFFLINE is set, and the local cache does not hold {case.shown}", "unset HF_HUB_OFFLINE"


def _disabled(case: Case) -> Said:
    return f"{case.repo} was closed by the hub", f"see {case.page}"


def _not_the_hub(case: Case) -> Said:
    said = f"something else than a hub answered for {case.endpoint}: a sign-in page, a proxy, or a wrong HF_ENDPOINT"
    return said, f"open {case.endpoint} in a browser, sign in to the network, and try again"


def _bad_request(case: Case) -> Said:
    return f"the hub refuses the request: {case.said}", f"hubtool card checks a card; the page is {case.page}"


def _bad_name(case: Case) -> Said:
    return f"the hub's client refuses a name: {case.said}", "write it as hf://owner/name[@revision][/file]"


def _no_token(case: Case) -> Said:
    return "this needs a token, and none is stored", f"{_LOGIN}, or set HF_TOKEN"


def _login_failed(case: Case) -> Said:
    return f"signing in failed: {case.said}", _LOGIN


def _no_header(case: Case) -> Said:
    return f"{case.shown} holds no safetensors header that can be read: {case.said}", f"hubtool pull {case.shown}"


def _same_twice(case: Case) -> Said:
    return f"the hub refuses two names for one file: {case.said}", "rename one of the files"


def _xet(case: Case) -> Said:
    return f"the Xet transfer failed: {case.said}", "the same command with HF_HUB_DISABLE_XET=1 goes over plain HTTPS"


def _timeout(case: Case) -> Said:
    return (
        f"the hub at {case.endpoint} did not answer in time",
        "run the same command again: it goes on where it stopped",
    )


def _no_connection(case: Case) -> Said:
    return f"no connection to the hub at {case.endpoint}: {case.said}", "check the network and HF_ENDPOINT"


def _broken_off(case: Case) -> Said:
    said = f"the connection to the hub at {case.endpoint} broke"
    return said, "run the same command again: it goes on where it stopped"


def _redirects(case: Case) -> Said:
    return f"the hub at {case.endpoint} redirects in a circle", "check HF_ENDPOINT and the proxy"


def _bad_card(case: Case) -> Said:
    return f"the hub refuses the model card: {case.said}", "hubtool card REF checks it without the network"


def _upload(case: Case) -> Said:
    return (
        f"the upload to the hub's storage failed: {case.said}",
        "run the same command again: what is there is not sent twice",
    )


def _token_refused(case: Case) -> Said:
    if "Invalid credentials" in case.said or "token" in case.said.lower():
        return "the hub does not know this token (expired or mistyped)", f"{_LOGIN}, or unset HF_TOKEN"
    return f"the hub wants to know who asks: {case.said}", _LOGIN


def _forbidden(case: Case) -> Said:
    said = f"this account or token may not do that: {case.said}"
    return said, f"make a token with the right for {case.repo} at {case.endpoint}/settings/tokens, then: {_LOGIN}"


def _not_found(case: Case) -> Said:
    response = getattr(case.error, "response", None)
    if response is not None and _XET_TOKEN.search(str(response.url)):
        return f"the hub at {case.endpoint} has no Xet storage", "set HF_HUB_DISABLE_XET=1"
    return f"the hub at {case.endpoint} knows no such address: {case.said}", "check the name and HF_ENDPOINT"


def _conflict(case: Case) -> Said:
    return f"the hub says that this is there already, or contradicts it: {case.said}", f"see {case.page}"


def _stale(case: Case) -> Said:
    return f"somebody has committed to {case.repo} since it was read", "run the same command again: it plans anew"


def _too_large(case: Case) -> Said:
    return f"the hub refuses so much at once: {case.said}", "publish fewer or smaller files"


def _limited(case: Case) -> Said:
    response = getattr(case.error, "response", None)
    seconds = wait_of(response.headers) if response is not None else None
    when = f"in {seconds:.0f} seconds" if seconds else "in some minutes"
    return (
        "the hub limits how often this account may ask",
        f"try again {when}; signed in, the limit is higher: {_LOGIN}",
    )


def _by_range(case: Case) -> Said:
    if (case.status or 0) >= 500:
        return f"the hub at {case.endpoint} fails (status {case.status})", "try again later"
    return f"the hub answers with status {case.status}: {case.said}", f"see {case.page}"


def _size(case: Case) -> Said:
    return "the hub sent another number of bytes than it promised", "run the same command again"


def _unknown(case: Case) -> Said:
    if "onsistency" in case.said:
        return _size(case)
    return f"{type(case.error).__name__}: {case.said}", f"see {case.page}"


def wait_of(headers: Any) -> float | None:
    """Seconds to wait that a server asks for: ``Retry-After``, or what is left of its ``RateLimit`` window."""
    asked = str(headers.get("retry-after", "")).strip()
    if asked.isdigit():
        return float(asked)
    window = re.search(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d{1,6})", str(headers.get("ratelimit", "")))
    return float(window[1]) if window else None


_Row = tuple[str, Callable[[Case], Said]]
_BY_CLASS: tuple[_Row, ...] = (  # the more special first: GatedRepoError is a RepositoryNotFoundError
    ("OfflineModeIsEnabled", _is_offline),
    ("GatedRepoError", _gated),
    ("RepositoryNotFoundError", _no_repository),
    ("RevisionNotFoundError", _no_revision),
    ("RemoteEntryNotFoundError", _no_file),
    ("DisabledRepoError", _disabled),
    ("LocalEntryNotFoundError", _not_local),  # IncompleteSnapshotError is one
    ("RevisionResolutionError", _not_local),
    ("CachedRepoTreeNotFoundError", _not_local),
    ("EntryNotFoundError", _no_file),
    ("FileMetadataError", _not_the_hub),
    ("BadRequestError", _bad_request),
    ("HFValidationError", _bad_name),
    ("HfUriError", _bad_name),
    ("LocalTokenNotFoundError", _no_token),
    ("OIDCError", _login_failed),
    ("DeviceCodeError", _login_failed),
    ("NotASafetensorsRepoError", _no_header),
    ("SafetensorsParsingError", _no_header),
    ("FileDuplicationError", _same_twice),
    ("XetDownloadError", _xet),
    ("XetAuthenticationError", _xet),
    ("XetObjectNotFoundError", _xet),
    ("DryRunError", _not_local),
)
_BY_STATUS: dict[int, Callable[[Case], Said]] = {
    401: _token_refused, 403: _forbidden, 404: _not_found, 409: _conflict, 412: _stale, 413: _too_large, 429: _limited,
}  # fmt: skip
_BROKEN: tuple[_Row, ...] = (  # httpx's own, then the builtin ones that come through huggingface_hub
    ("TimeoutException", _timeout),
    ("ConnectError", _no_connection),
    ("ProxyError", _no_connection),
    ("TooManyRedirects", _redirects),
    ("TransportError", _broken_off),
    ("JSONDecodeError", _not_the_hub),
    ("UnicodeDecodeError", _not_the_hub),
    ("BrokenAnswer", _size),
    ("ConnectionError", _xet),
    ("ValueError", _bad_card),
    ("RuntimeError", _upload),
)
