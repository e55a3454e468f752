"""What the commands of the harness share: an error that a user can mend is one line, and options are checked at once.

A module's command is ``run_main(main)`` instead of ``typer.run(main)``. The checks are callbacks of typer's options:
they are called before anything is measured, and leave the text as it is.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from harness.places import file_refused, results_refused

__all__ = [
    "Interruptible",
    "console",
    "fail",
    "mendable",
    "new_file",
    "new_results",
    "regular_expression",
    "run_main",
    "shares",
    "some_of",
    "whole_numbers",
]


def console() -> Console:
    """Standard output for tables: 200 columns where it is no terminal and COLUMNS is not set, as names that are broken
    over lines cannot be searched for.
    """
    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(markup=False, width=200 if wide else None)


def run_main(main: Callable[..., Any], *more: type[Exception]) -> None:
    """Run a function as the command line that its annotations describe; see `mendable`."""
    with mendable(*more):
        typer.run(main)


class Interruptible(TyperGroup):
    """Ctrl-C is exit code 130: 1 would say that something got worse."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            Console(markup=False, stderr=True).print("interrupted", style="red")
            raise typer.Exit(130) from None


@contextmanager
def mendable(*more: type[Exception]) -> Iterator[None]:
    """Errors of input, files and settings end the process with one line and exit code 2; others keep their traceback.

    Args:
        more: errors of this command that are of that kind.
    """
    kinds: tuple[type[Exception], ...] = (OSError, json.JSONDecodeError, re.error, *more)
    try:
        yield
    except kinds as error:
        fail(str(error))
    except ValueError as error:
        # Imported here: a command's help comes without torch.
        from recsys.errors import RecsysError
        from sparsecore.errors import SparsecoreError

        if not isinstance(error, RecsysError | SparsecoreError):
            raise
        fail(str(error))


def fail(why: str) -> None:
    """Say why on standard error, and end with exit code 2."""
    Console(markup=False, stderr=True).print(f"error: {why}", style="red", highlight=False, soft_wrap=True)
    sys.exit(2)


def whole_numbers(value: str) -> str:
    """Check of an option: whole numbers of at least 1 with commas between."""
    if not all(part.strip().isdecimal() and int(part) > 0 for part in value.split(",")):
        raise typer.BadParameter(
            f"expected whole numbers from 1 with commas between, as in 1,2; got {value!r}"
        )
    return value


def shares(value: str) -> str:
    """Check of an option: numbers above 0 and up to 1 with commas between."""
    try:
        good = all(0 < float(part) <= 1 for part in value.split(","))
    except ValueError:
        good = False
    if not good:
        raise typer.BadParameter(
            f"expected numbers above 0 and up to 1 with commas between, as in 0.5,0.1; got {value!r}"
        )
    return value


def some_of(known: Iterable[str]) -> Callable[[str], str]:
    """A check of an option: some of these names with commas between."""
    names = list(known)

    def check(value: str) -> str:
        if not set(value.split(",")) <= set(names):
            raise typer.BadParameter(
                f"expected some of {', '.join(names)} with commas between; got {value!r}"
            )
        return value

    return check


def regular_expression(value: str | None) -> str | None:
    """Check of an option: a regular expression."""
    try:
        re.compile(value or "")
    except re.error as error:
        raise typer.BadParameter(f"expected a regular expression, got {value!r}: {error}") from None
    return value


def new_results(value: Path | None) -> Path | None:
    """Check of an option OUTPUT, of which OUTPUT.json and OUTPUT.md are made: that they can be. Its folder is made."""
    _refuse(results_refused(value) if value is not None else "")
    return value


def new_file(value: Path | None) -> Path | None:
    """Check of an option: a file that can be written, as its folder is there. Measuring comes first, writing last."""
    _refuse(file_refused(value) if value is not None else "")
    return value


def _refuse(why: str) -> None:
    if why:
        raise typer.BadParameter(why)
