"""Xet, the Hub's chunk store, as an ordered stream of bytes from any offset: what a resumed and hashed transfer needs.

huggingface_hub writes whole files through hf_xet and verifies none of them; its stream of the same package fits in here.

What it keeps in memory does not depend on the size of the file: measured with hf_xet 1.8, a pull peaks at 190 MB from 256 MB to 1 GB, of
which 60 are the program without Xet. The rest are chunks fetched ahead and being unpacked, inside hf_xet; ``_LIMITS`` bounds them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

from hubtool.hub.client import Client, Entry
from hubtool.hub.refs import HubRef

_LIMITS: dict[str, Any] = {
    "client.retry_max_attempts": 2,
    "client.retry_base_delay": "200ms",
    "client.retry_max_duration": "20s",
    "client.connect_timeout": "10s",
    "client.read_timeout": "30s",
    "client.ac_max_download_concurrency": 8,
    "reconstruction.download_buffer_size": 32_000_000,
    "reconstruction.download_buffer_perfile_size": 16_000_000,
    "reconstruction.download_buffer_limit": 32_000_000,
    "reconstruction.min_prefetch_buffer": 32_000_000,
    "reconstruction.min_reconstruction_fetch_size": 16_000_000,
    "reconstruction.max_reconstruction_fetch_size": 16_000_000,
    "telemetry.enabled": False,
}


def is_possible(entry: Entry) -> bool:
    """Whether a file lies in Xet, hf_xet can stream it, and nobody switched Xet off (HF_HUB_DISABLE_XET)."""
    if (
        entry.xet is None
        or not entry.size
        or os.environ.get("HF_HUB_DISABLE_XET", "").upper() in ("1", "ON", "YES", "TRUE")
    ):
        return False
    from huggingface_hub import constants

    if constants.HF_HUB_DISABLE_XET:
        return False
    try:
        hf_xet: Any = import_module("hf_xet")
    except ImportError:
        return False
    return hasattr(hf_xet, "XetSession") and hasattr(hf_xet.XetSession, "new_download_stream_group")


def stream(client: Client, ref: HubRef, entry: Entry, start: int) -> Iterator[bytes]:
    """The content of ``entry`` from byte ``start``, in order. Raises what hf_xet and huggingface_hub raise."""
    hf_xet: Any = import_module("hf_xet")
    with _group(client, ref, entry) as group:
        yield from group.download_stream(hf_xet.XetFileInfo(entry.xet, entry.size), start=start)


@cache
def _session(_pid: int) -> Any:
    """A session of this process with limits of our own: huggingface_hub's waits minutes where HTTP could step in, and buffers 1.5 GB.

    hf_xet plans up to 8 GB of a file ahead of its reader; blocks of 16 MB halve its memory and cost four requests for every 64 MB.
    """
    hf_xet: Any = import_module("hf_xet")
    config = hf_xet.XetConfig()
    for name, value in _LIMITS.items():
        with suppress(ValueError, TypeError, KeyError, AttributeError, RuntimeError):  # another release has other names
            config = config.with_config(name, value)
    return hf_xet.XetSession(config)


def _group(client: Client, ref: HubRef, entry: Entry) -> Any:
    from huggingface_hub.utils._xet import (
        XetFileData,
        refresh_xet_connection_info,
        xet_headers_without_auth,
    )

    route = f"{client.endpoint}/api/models/{ref.repo}/xet-read-token/{ref.branch}"
    headers = client.headers(route)
    info = refresh_xet_connection_info(file_data=XetFileData(str(entry.xet), route), headers=headers)
    return _session(os.getpid()).new_download_stream_group(
        endpoint=info.endpoint,
        token=info.access_token,
        token_expiry_unix_secs=info.expiration_unix_epoch,
        token_refresh_url=route,
        token_refresh_headers=headers,
        custom_headers=xet_headers_without_auth(headers),
    )
