"""The names of huggingface_hub and hf_xet that hubtool uses without a promise of theirs: an upgrade that takes one away fails here, in words."""

from __future__ import annotations

import inspect
from functools import reduce
from importlib import import_module

import pytest

from hubtool.hub import xet

# module:name -> where it is used, and what to do without it
NAMES = {
    "huggingface_hub.utils._http:default_client_factory": "hub/client.py _set_time_limits: pass time limits another way",
    "huggingface_hub.utils._http:_GLOBAL_CLIENT_FACTORY": "hub/client.py _set_time_limits: how to see a client of the caller's own making",
    "huggingface_hub.utils._xet:XetFileData": "hub/xet.py _group: ask the xet-read-token route by hand",
    "huggingface_hub.utils._xet:refresh_xet_connection_info": "hub/xet.py _group: ask the xet-read-token route by hand",
    "huggingface_hub.utils._xet:xet_headers_without_auth": "hub/xet.py _group: leave Authorization out by hand",
    "hf_xet:XetSession.new_download_stream_group": "hub/xet.py: without it every pull goes over HTTP",
    "hf_xet:XetFileInfo": "hub/xet.py stream",
    "hf_xet:XetConfig.with_config": "hub/xet.py _session: limits of memory and time",
    "huggingface_hub.utils._http:_HUB_ORIGINS": "tests/support/hub.py point: how the client is led to a local hub",
    "huggingface_hub.utils._http:_url_origin": "tests/support/hub.py point",
    "huggingface_hub.utils._xet:abort_xet_session": "tests/support/hub.py point",
    # public, but young or renamed before
    "huggingface_hub.utils:httpx": "hub/client.py: the httpx that the client uses, of whatever major version",
    "huggingface_hub.utils:set_client_factory": "hub/client.py _set_time_limits",
    "huggingface_hub.utils:get_session": "hub/client.py _opened",
    "huggingface_hub.utils:hf_raise_for_status": "hub/client.py _raise_for_status",
    "huggingface_hub.utils:build_hf_headers": "hub/client.py headers",
    "huggingface_hub.constants:HF_HUB_DISABLE_XET": "hub/xet.py is_possible",
    "huggingface_hub.constants:HF_HUB_CACHE": "hub/local_cache.py folder",
    "huggingface_hub.constants:HF_HUB_DOWNLOAD_TIMEOUT": "hub/client.py _opened",
    "huggingface_hub.constants:HF_HUB_DISABLE_IMPLICIT_TOKEN": "hub/client.py _token_for",
}
WORDS = {  # function: names of its arguments that hubtool gives
    "huggingface_hub:HfApi.create_commit": {"commit_message", "commit_description", "revision", "parent_commit", "create_pr"},
    "huggingface_hub:HfApi.create_repo": {"private", "exist_ok"},
    "huggingface_hub:HfApi.create_branch": {"branch", "revision", "exist_ok"},
    "huggingface_hub:HfApi.model_info": {"revision", "timeout"},
    "huggingface_hub:HfApi.list_repo_tree": {"recursive", "revision"},
    "huggingface_hub:HfApi.get_repo_discussions": {"discussion_type", "discussion_status"},
    "huggingface_hub.utils:build_hf_headers": {"token", "library_name", "library_version"},
    "huggingface_hub.utils._xet:refresh_xet_connection_info": {"file_data", "headers"},
}  # fmt: skip


def found(name: str) -> object:
    module, _, path = name.partition(":")
    return reduce(getattr, path.split("."), import_module(module))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_nobody_promised_is_still_there(name: str) -> None:
    try:
        found(name)
    except (ImportError, AttributeError):
        pytest.fail(f"{name} is gone from this release; it is used in {NAMES[name]}")


@pytest.mark.parametrize("name", WORDS)
def test_a_function_still_takes_what_it_is_given(name: str) -> None:
    function = found(name)
    assert callable(function)
    assert inspect.signature(function).parameters.keys() >= WORDS[name], name


def test_every_limit_of_xet_is_known_to_this_release() -> None:
    """One that is not is passed over in silence: transfers would then wait for minutes and hold 1.5 GB (hub/xet.py _LIMITS)."""
    hf_xet = import_module("hf_xet")
    assert set(hf_xet.XetConfig().keys()) >= set(xet._LIMITS)
    config = hf_xet.XetConfig()
    for key, value in xet._LIMITS.items():
        config = config.with_config(key, value)


def test_the_answer_to_a_listing_has_what_is_read_of_it() -> None:
    """``hub/client.py`` _entry reads these of every file."""
    from huggingface_hub.hf_api import RepoFile

    given = {"path": "a", "size": 1, "oid": "b", "lfs": {"oid": "c", "size": 1, "pointerSize": 1}, "xetHash": "d"}
    one = RepoFile(**given)
    assert (one.path, one.size, one.blob_id, one.xet_hash) == ("a", 1, "b", "d")
    assert one.lfs is not None
    assert one.lfs.sha256 == "c"
