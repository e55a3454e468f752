"""The errors that `recsys` raises for what a user can put right.

The command line prints them without a traceback and ends with exit code 2, so every message says what was
expected, what came, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["ConfigError", "DataError", "OutputExistsError", "RecsysError", "naming"]


class RecsysError(ValueError):
    """Base class of every error that recsys raises on purpose."""


class DataError(RecsysError):
    """A dataset is unknown, or a data file is missing, damaged, or holds what it must not."""


class ConfigError(RecsysError):
    """A configuration key or value is unknown or out of range."""


class OutputExistsError(RecsysError):
    """An output folder exists already and overwriting was not asked for."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What is wrong with the data of a file or folder is said with its path."""
    try:
        yield
    except DataError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error
