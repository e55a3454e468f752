"""The command line. It imports nothing heavy before a command needs it: `recsys --help` answers at once."""

from __future__ import annotations

from recsys.cli import runs, settings, sweeps  # noqa: F401  (they add their commands)
from recsys.cli.app import app
from recsys.cli.data import data_app

__all__ = ["app", "main"]

app.add_typer(data_app, name="data")


def main() -> None:
    """Entry point of the `recsys` command."""
    app()
