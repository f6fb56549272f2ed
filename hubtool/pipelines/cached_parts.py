"""What a single file lacks (tokenizers, sometimes encoders and VAE): from the Hub's cache, and fetched there when it is missing."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from hubtool.errors import HubError, Unsupported
from hubtool.layouts.checkpoint_tables import Pipeline

_WEIGHTS = ("*.safetensors", "*.bin")
_WORDS = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
# the same weights again, in other containers and dtypes
_SPARE = ("*.bin", "*.msgpack", "*.h5", "*.onnx*", "*.ckpt", "*.fp16.*", "*.non_ema.*")


def homes(table: Pipeline, wanted: Collection[str], file: Path) -> dict[str, Path]:
    """Part -> a folder that holds it, for every ``wanted`` part of a family's pipeline.

    The Hub's cache is asked first, whatever repository of the family it has; what is in none is downloaded, that part alone. Raises
    ``Unsupported`` for a family without known repositories, ``HubError`` with the commands that help when there is no network.
    """
    found = {name: home for name in wanted if (home := _cached(table, name))}
    missing = [name for name in wanted if name not in found]
    return {**found, **_fetched(table, missing, file)} if missing else found


def _cached(table: Pipeline, name: str) -> Path | None:
    return next((home for home in _candidates(table, name) if _holds(home, name)), None)


def _candidates(table: Pipeline, name: str) -> Iterator[Path]:
    for repository in table.repositories:
        if (snapshot := _snapshot(repository)) is not None:
            yield snapshot / name
    for repository in table.alone.get(name, ()):
        if (snapshot := _snapshot(repository)) is not None:
            yield snapshot


def _snapshot(repository: str) -> Path | None:
    """The newest version of a repository in the Hub's cache, all of it or some."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None


def _holds(home: Path, name: str) -> bool:
    """Whether the part is there: a download that was narrowed or cut short leaves some files of it."""
    if name.startswith("tokenizer"):
        return any((home / word).is_file() for word in _WORDS)
    return (home / "config.json").is_file() and any(next(home.glob(glob), None) for glob in _WEIGHTS)


def _fetched(table: Pipeline, missing: list[str], file: Path) -> dict[str, Path]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    lacks = f"this file has no {', '.join(missing)}"
    if not table.repositories:
        raise Unsupported(lacks, path=file, hint=f"--config-from FOLDER: a diffusers folder of {table.family}")
    wanted, said = [f"{name}/*" for name in missing], ""
    for repository in table.repositories:
        try:
            snapshot = Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=list(_SPARE)))
        except HfHubHTTPError as error:  # gone or gated: the next may have it
            said = said or str(error).strip().splitlines()[0]
            continue
        except (LocalEntryNotFoundError, OSError, ValueError) as error:  # no network: no other will answer
            said = said or str(error).strip().splitlines()[0]
            break
        found = {name: snapshot / name for name in missing}
        if all(_holds(home, name) for name, home in found.items()):
            return found
    raise HubError(f"{lacks}, and the Hub does not give it: {said}", hint=_help(table, wanted))


def _help(table: Pipeline, wanted: list[str]) -> str:
    patterns = " ".join(f"'{pattern}'" for pattern in wanted)
    return (
        f"--config-from FOLDER (a diffusers folder of {table.family}), or once with a network: "
        f"hf download {table.repositories[0]} --include {patterns}"
    )
