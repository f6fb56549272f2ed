"""``hubtool.Hub``: what the command line does with hubs, from Python.

hub = hubtool.Hub()                        # HF_ENDPOINT and the stored token
hub.publish("style.safetensors", "me/style", strength=0.8, trigger_words=["sks dog"])
hub.pull("hf://me/style", "models/")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubtool.actions.publish import publish
from hubtool.actions.publish_facts import Said
from hubtool.actions.publish_result import Options, Result

if TYPE_CHECKING:
    from hubtool.actions.card import Checked, Written
    from hubtool.actions.pull_result import Pulled
    from hubtool.actions.remote import RemoteIndex, RemoteReport
    from hubtool.hub.client import Client

_SAID = {field.name for field in fields(Said)}
_OTHER_NAMES = {"trigger_words": "words", "license": "licence", "license_name": "licence_name", "license_link": "licence_link", "pr": "pull_request"}  # fmt: skip
_LISTS = frozenset({"words", "base_models", "tags", "drop_metadata", "layouts", "previews"})
Ref = str | PathLike[str]


class Hub:
    """One hub. ``endpoint`` None: HF_ENDPOINT, else Hugging Face; ``token`` None: the stored one, False: none."""

    def __init__(
        self, endpoint: str | None = None, token: str | bool | None = None, *, library: str | None = None
    ) -> None:
        self._endpoint = endpoint
        self._token = token
        self._library = library

    def __repr__(self) -> str:
        return f"Hub({self.client.endpoint!r})"

    @cached_property
    def client(self) -> Client:
        """The connection; made when it is first needed. Raises ``MissingExtra`` without huggingface_hub."""
        from hubtool.hub.client import Client as Made

        return Made(self._endpoint, self._token)

    def publish(self, refs: Ref | Sequence[Ref], repo: str, **asked: Any) -> Result:
        """Publish artifacts in one commit. ``asked``: the fields of ``Said`` (title, licence, base_models, words, strength, tags ...)
        and of ``Options`` (public, pull_request, dry_run, previews, layouts, prune ...). Raises as ``actions.publish``."""
        said, options = self._asked(asked)
        named = [refs] if isinstance(refs, str | PathLike) else refs
        return publish([fspath(ref) for ref in named], repo, said, options, self.client)

    def pull(self, refs: str | Sequence[str], output: Ref | None = None, **asked: Any) -> list[Pulled]:
        """Fetch files, folders or whole repositories, verified. ``asked``: fields of ``actions.pull_result.Options``. Raises as ``actions.pull``."""
        from hubtool.actions.pull import pull, raise_failed
        from hubtool.actions.pull_result import Options as Asked

        values: dict[str, Any] = dict(asked)
        values |= {name: _tuple(asked[name]) for name in ("include", "exclude") if name in asked}
        folder = None if output is None else Path(output)
        options = Asked(**{"library": self._library, **values, "output": folder})
        pulled = pull([refs] if isinstance(refs, str) else list(refs), options, client=self.client)
        raise_failed(pulled)
        return pulled

    def inspect(self, ref: str, *, refresh: bool = False) -> list[RemoteReport]:
        """Say what the weights behind a reference are, from their headers; nothing is downloaded. ``refresh``: read them again."""
        from hubtool.actions.remote import inspect_remote

        return inspect_remote(ref, self._library, client=self.client, refresh=refresh)

    def index(self, ref: str, *, refresh: bool = False) -> RemoteIndex:
        """Read a whole repository from its listing and headers, and tell what of it the library has."""
        from hubtool.actions.remote import index_remote

        return index_remote(ref, self._library, client=self.client, refresh=refresh)

    def card(self, ref: Ref, output: Ref | None = None, *, repo: str | None = None, **asked: Any) -> Written:
        """Write the card of an artifact alone."""
        from hubtool.actions.card import write_card

        said, options = self._asked(asked)
        return write_card(fspath(ref), None if output is None else Path(output), repo=repo, said=said, options=options)

    def check_card(self, ref: Ref) -> Checked:
        """Check a card: a Markdown file, or that of ``hf://owner/name``."""
        from hubtool.actions.card import check_card

        text = fspath(ref)
        return check_card(text, client=self.client if text.startswith("hf://") else None)

    def _asked(self, asked: Mapping[str, Any]) -> tuple[Said, Options]:
        named = {_OTHER_NAMES.get(key, key): value for key, value in asked.items()}
        lists = {key: _tuple(value) for key, value in named.items() if key in _LISTS}
        values = {**named, **lists}
        if "previews" in values:
            values["previews"] = tuple(map(Path, values["previews"]))
        said = {key: value for key, value in values.items() if key in _SAID}
        rest = {key: value for key, value in values.items() if key not in _SAID}
        return Said(**said), Options(**{"library": self._library, **rest})


def _tuple(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, str | PathLike) else tuple(value)
