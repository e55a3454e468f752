"""asv's pages, viewable without a network: asv writes the data, asv-tachyon an interface that loads nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from harness.history.run import RESULTS
from harness.history.writer import HistoryError

__all__ = ["publish"]


def publish(root: Path, output: Path) -> Path:
    """Write the site of all kept results into a folder.

    Returns:
        Its index.html. Browsers show it over http only: asv's data are files that it fetches.

    Raises:
        HistoryError: no results yet, or asv fails.
    """
    if not (root / RESULTS / "benchmarks.json").exists():
        raise HistoryError(f"{root / RESULTS} holds no results yet: measure a commit with harness run")
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


def _run(root: Path, command: list[str]) -> None:
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise HistoryError(f'{command[0]} is not installed: pip install "sparsecore[bench]"') from None
    if done.returncode:
        raise HistoryError(
            f"{' '.join(command)} ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"
        )
