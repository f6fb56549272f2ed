"""Work of diffusers, transformers and the Hub's client: without their talk, and with their errors in our words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hubtool.errors import CorruptFile, FileError, HubError, UsageProblem


@contextmanager
def explained(base: str | Path, hint: str | None = None) -> Iterator[None]:
    """Raises ``HubError`` for a repository, ``UsageProblem`` for a missing package, else ``CorruptFile`` (``FileError`` with a hint)."""
    try:
        yield
    except ImportError as error:
        raise UsageProblem(f"diffusers needs a package for this base: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, _invalid()) as error:
        said = str(error).strip().splitlines()
        told = f"diffusers cannot open this base: {said[0] if said else type(error).__name__}"
        if isinstance(error, OSError) and not Path(base).exists():
            raise HubError(told, hint="hubtool needs a network, or the repository in the Hub's cache") from error
        kind = FileError if hint else CorruptFile
        raise kind(told, path=base, hint=hint) from error


def _invalid() -> type[Exception]:
    """What transformers raises for a configuration that contradicts itself, where it has an error of its own."""
    from huggingface_hub import errors

    found: type[Exception] = getattr(errors, "StrictDataclassError", ValueError)
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """diffusers' own progress bars and advice would go through the talk of the command line."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    shown = logging.is_progress_bar_enabled() if hasattr(logging, "is_progress_bar_enabled") else True
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
