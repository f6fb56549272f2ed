"""Failures of a hub in words: one line with the cause, a way out, exit code 6, and never a token."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import pytest

from hubtool.errors import FileError, HubError, MissingExtra
from hubtool.hub.client import Client
from hubtool.hub.errors import explain, explained, failures, is_unreachable, redact, wait_of
from hubtool.hub.refs import HubRef
from hubtool.hub.retrying import Tries, is_passing

if TYPE_CHECKING:
    from tests.support.hub import LocalHub  # pytest_plugins imports it first

pytest_plugins = ["tests.support.hub"]

REF = HubRef("owner", "name", "v1", "a.safetensors")
SITE = "https://hub.test"
SECRET = "hf_SECRETSECRETSECRETSECRET"


def response(status: int, headers: dict[str, str] | None = None, url: str = f"{SITE}/api/models/owner/name") -> Any:
    from huggingface_hub.utils import httpx

    return httpx.Response(status, headers=headers, json={"error": "said so"}, request=httpx.Request("GET", url))


def raised(
    status: int, headers: dict[str, str] | None = None, url: str = f"{SITE}/api/models/owner/name"
) -> BaseException:
    """What huggingface_hub makes of an answer."""
    from huggingface_hub.utils import hf_raise_for_status

    try:
        hf_raise_for_status(response(status, headers, url))
    except failures() as error:
        return error
    raise AssertionError("no error")


ANSWERS: dict[str, tuple[int, dict[str, str], str]] = {
    "does not exist, or is private": (404, {"X-Error-Code": "RepoNotFound"}, "hf auth login"),
    "has no revision v1": (404, {"X-Error-Code": "RevisionNotFound"}, "/owner/name/commits"),
    "has no file a.safetensors at v1": (404, {"X-Error-Code": "EntryNotFound"}, "hubtool inspect hf://owner/name"),
    "is gated: its owner has not let": (403, {"X-Error-Code": "GatedRepo"}, f"ask for access at {SITE}/owner/name"),
    "is gated, and no token was sent": (401, {"X-Error-Code": "GatedRepo"}, "hf auth login"),
    "was closed by the hub": (403, {"X-Error-Message": "Access to this resource is disabled."}, SITE),
    "does not know this token": (
        401,
        {"X-Error-Message": "Invalid credentials in Authorization header"},
        "unset HF_TOKEN",
    ),
    "may not do that: No right": (403, {"X-Error-Message": "No right to write"}, "/settings/tokens"),
    "refuses the request": (400, {"X-Error-Message": "bad yaml"}, "hubtool card"),
    "is there already": (409, {}, SITE),
    "has committed to owner/name since": (412, {}, "again"),
    "so much at once": (413, {}, "fewer"),
    "limits how often": (429, {"RateLimit": '"api";r=0;t=55'}, "in 55 seconds"),
    "fails (status 500)": (500, {}, "later"),
    "fails (status 503)": (503, {}, "later"),
    "status 418": (418, {}, SITE),
}


@pytest.mark.parametrize("said", ANSWERS)
def test_every_answer_of_a_hub_is_one_line_with_a_way_out(said: str) -> None:
    status, headers, hint = ANSWERS[said]
    found = explain(raised(status, headers), REF, SITE)
    assert isinstance(found, HubError)
    assert found.exit_code == 6
    assert said in found.message
    assert "\n" not in found.message
    assert hint in str(found.hint)


def test_a_hub_without_xet_is_told_by_the_address_that_fails() -> None:
    found = explain(raised(404, {}, f"{SITE}/api/models/owner/name/xet-read-token/main"), REF, SITE)
    assert "has no Xet storage" in found.message
    assert "HF_HUB_DISABLE_XET=1" in str(found.hint)


LOCAL = {  # class: (arguments, what is said)
    "OfflineModeIsEnabled": (("x",), "HF_HUB_OFFLINE is set"),
    "LocalEntryNotFoundError": (("x",), "did not answer, and the local cache"),
    "IncompleteSnapshotError": (
        (
            "x",
            "y",
        ),
        "local cache",
    ),
    "RevisionResolutionError": (("x",), "local cache"),
    "FileMetadataError": (("x",), "something else than a hub"),
    "HFValidationError": (("bad name",), "refuses a name: bad name"),
    "HfUriError": (
        (
            "hf://",
            "no name",
        ),
        "refuses a name",
    ),
    "LocalTokenNotFoundError": (("x",), "needs a token"),
    "NotASafetensorsRepoError": (("x",), "no safetensors header"),
    "SafetensorsParsingError": (("x",), "no safetensors header"),
    "FileDuplicationError": (("x",), "two names for one file"),
    "XetDownloadError": (("x",), "the Xet transfer failed"),
    "DryRunError": (("x",), "local cache"),
    "XetAuthenticationError": (("x",), "the Xet transfer failed"),
    "XetObjectNotFoundError": (("x",), "the Xet transfer failed"),
    "CachedRepoTreeNotFoundError": (("x",), "local cache"),
    "OIDCError": (("x",), "signing in failed"),
    "DeviceCodeError": (("x",), "signing in failed"),
    "UnicodeDecodeError": (("utf-8", b"\xff", 0, 1, "bad"), "something else than a hub"),
    "ProxyError": (("x",), "no connection"),
    "ReadError": (("reset",), "broke"),
    "RemoteProtocolError": (("cut",), "broke"),
    "ReadTimeout": (("slow",), "in time"),
    "ConnectError": (("refused",), "no connection"),
    "TooManyRedirects": (("x",), "in a circle"),
    "ConnectionError": (("cas failed",), "the Xet transfer failed"),
    "ValueError": (("license is not valid",), "refuses the model card: license is not valid"),
    "RuntimeError": (("upload of part 2",), "the upload to the hub's storage failed"),
    "OSError": (("Consistency check failed: file should be of size 10",), "another number of bytes"),
}


def local_error(name: str) -> BaseException:
    """An exception of huggingface_hub, of httpx, of hf_xet, or a builtin one."""
    import builtins

    import hf_xet
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    kind = next(getattr(home, name) for home in (builtins, errors, httpx, hf_xet) if hasattr(home, name))
    found: BaseException = kind(*LOCAL[name][0])
    return found


@pytest.mark.parametrize("name", LOCAL)
def test_what_is_no_answer_is_explained_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(HubError, match=LOCAL[name][1]) as caught, explained(REF, SITE):
        raise local_error(name)
    assert caught.value.hint


def test_an_error_of_the_disk_stays_one_of_the_disk() -> None:
    found = explain(PermissionError(13, "Permission denied", "/models/a"), REF)
    assert isinstance(found, FileError)
    assert found.exit_code == 1
    assert found.path == "/models/a"


@pytest.mark.parametrize(
    "text",
    [
        f"Bearer {SECRET}", f"token={SECRET}", SECRET, f"https://user:{SECRET}@hub.test/x", "https://x/?api_key=abcdefgh123",
        "https://cdn/get?exp=1&sig=abcdef0123", "X-Amz-Signature=abcdefabcdef", "access_token=abcdef",
    ],
)  # fmt: skip
def test_nothing_secret_is_said(text: str) -> None:
    said = redact(f"failed: {text} and more")
    for secret in (SECRET, "abcdef"):
        assert secret not in said
    assert said.startswith("failed: ")


def test_the_token_in_use_is_not_said_whatever_it_looks_like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "odd-token-of-a-mirror")
    assert "odd-token" not in redact("the server says odd-token-of-a-mirror is unknown")


def test_a_client_does_not_show_its_token(hub: LocalHub, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    hub.put("tester/style", {"a.txt": "a"})
    client = Client(hub.url, SECRET)
    assert SECRET not in repr(client)
    with pytest.raises(HubError) as caught:
        client.resolve(HubRef("tester", "style"))
    assert SECRET not in f"{caught.value} {caught.value.hint}"
    assert SECRET not in caplog.text


def test_a_token_goes_to_the_endpoint_only(hub: LocalHub) -> None:
    client = Client(hub.url)
    assert "authorization" in client.headers(f"{hub.url}/api/models/a/b")
    for url in (hub.cdn, "https://huggingface.co/a", hub.url.replace("127.0.0.1", "localhost"), "http://evil.test/"):
        assert "authorization" not in client.headers(url)


@pytest.mark.parametrize("endpoint", ["http://hub.example", "http://127.0.0.1.evil.test", "http://192.168.0.2:8080"])
def test_a_token_does_not_travel_unencrypted_to_another_machine(endpoint: str) -> None:
    assert not Client(endpoint, SECRET).has_token
    assert Client(endpoint.replace("http:", "https:"), SECRET).has_token


@pytest.mark.parametrize(
    ("status", "headers"),
    [(401, {}), (403, {}), (404, {"X-Error-Code": "RepoNotFound"}), (401, {"X-Error-Code": "GatedRepo"})],
)
def test_a_hub_over_plain_http_is_told_why_it_gets_no_token(status: int, headers: dict[str, str]) -> None:
    for endpoint, told in (
        ("http://10.0.0.5:8080", True),
        ("https://10.0.0.5", False),
        ("http://127.0.0.1:8080", False),
    ):
        found = explain(raised(status, headers, f"{endpoint}/api/models/owner/name"), REF, endpoint)
        assert ("no token is sent over plain http" in str(found.hint)) is told
    missing = explain(raised(404, {"X-Error-Code": "EntryNotFound"}), REF, "http://10.0.0.5:8080")
    assert "plain http" not in str(missing.hint)


def test_an_endpoint_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.test/")
    assert Client(token=False).endpoint == "https://mirror.test"
    assert Client("https://other.test", token=False).endpoint == "https://other.test"


def test_what_passes_is_tried_again_and_what_does_not_is_not() -> None:
    assert is_passing(raised(503), SITE)
    assert is_passing(raised(403, {}, "https://cdn.test/get/1"), SITE)
    assert not is_passing(raised(403, {"X-Error-Message": "no right"}), SITE)
    assert not is_passing(raised(404, {"X-Error-Code": "RepoNotFound"}), SITE)
    assert is_unreachable(raised(502))
    assert not is_unreachable(raised(404))


def test_waiting_follows_the_hub_and_ends() -> None:
    waits: list[float] = []
    tries = Tries(SITE, waits.append, attempts=4)
    limited = raised(429, {"RateLimit": '"api";r=0;t=7'})
    tries.again(limited)
    assert waits == [7.1]
    tries.again(raised(500))
    tries.again(raised(500))
    with pytest.raises(type(limited)):
        tries.again(raised(500))
    assert all(wait <= 8 for wait in waits)


def test_nobody_waits_an_hour() -> None:
    with pytest.raises(failures()):
        Tries(SITE, lambda _: None).again(raised(429, {"Retry-After": "3600"}))


def test_how_long_to_wait_is_read_from_both_headers() -> None:
    assert wait_of({"retry-after": "12"}) == 12
    assert wait_of({"ratelimit": '"api";r=0;t=55'}) == 55
    assert wait_of({"ratelimit": '"api";r=3;t=55'}) is None
    assert wait_of({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}) is None


def test_without_huggingface_hub_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra) as caught:
        Client()
    assert "hubtool[hub]" in str(caught.value.hint)


def test_a_page_in_place_of_an_answer_is_named(hub: LocalHub) -> None:
    hub.put("tester/style", {"a.txt": "a"})
    hub.fault("html", "/api/", times=9)
    with pytest.raises(HubError, match="something else than a hub answered"):
        Client(hub.url).resolve(HubRef("tester", "style"))


def test_a_hub_that_never_answers_is_not_waited_for(hub: LocalHub) -> None:
    hub.put("tester/style", {"a.txt": "a"})
    hub.fault("reset", "/api/", times=99)
    with pytest.raises(HubError, match="broke") as caught:
        Client(hub.url, sleep=lambda _: None).resolve(HubRef("tester", "style"))
    assert caught.value.hint
