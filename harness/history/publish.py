"""asv's pages, viewable without a network: asv writes the data, asv-tachyon an interface that loads nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from harness.history.run import RESULTS
from harness.history.writer import HistoryError

__all__ = ["publish"]

_OF_A_SITE = ("index.json", "graphs")  # what asv writes


def publish(root: Path, output: Path) -> Path:
    """Write the site of all kept results into a folder.

    Returns:
        Its index.html. Browsers show it over http only: asv's data are files that it fetches.

    Raises:
        HistoryError: no results yet, a folder with something else in it, which asv would delete, or asv fails.
    """
    if not (root / RESULTS / "benchmarks.json").exists():
        raise HistoryError(f"{root / RESULTS} holds no results yet: measure a commit with harness run")
    _refuse_others(output)
    config = root / "benchmarks" / "asv.conf.json"
    _run(
        root,
        [
            sys.executable,
            "-m",
            "asv",
            "publish",
            "--config",
            str(config),
            "--html-dir",
            str(output.absolute()),
        ],
    )
    _run(root, [str(Path(sys.executable).with_name("asv-tachyon")), "install", str(output.absolute())])
    return output / "index.html"


def _refuse_others(output: Path) -> None:
    """Let asv delete an earlier site, and nothing else."""
    if output.exists() and not output.is_dir():
        raise HistoryError(f"{output} is a file; name a folder for the site")
    if output.is_dir() and any(output.iterdir()) and not all((output / name).exists() for name in _OF_A_SITE):
        raise HistoryError(
            f"{output} holds other things than a site of asv, which would be deleted; name another folder"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HistoryError(f"{output} cannot be made: {error.strerror}; name another folder") from error


def _run(root: Path, command: list[str]) -> None:
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise HistoryError(f'{command[0]} is not installed: pip install "sparsecore[bench]"') from None
    if done.returncode:
        raise HistoryError(
            f"{' '.join(command)} ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"
        )
