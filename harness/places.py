"""Whether results can be written where they are asked for: looked at before anything is measured."""

from __future__ import annotations

import tempfile
from pathlib import Path

__all__ = ["file_refused", "results_refused"]


def results_refused(output: Path) -> str:
    """Why OUTPUT.json and OUTPUT.md cannot be made; empty if they can. Their folder is made."""
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"expected files in a folder that can be made, got {output}: {error.strerror}"
    found = (file_refused(output.with_name(output.name + suffix)) for suffix in (".json", ".md"))
    return next(filter(None, found), "")


def file_refused(file: Path) -> str:
    """Why a file cannot be written; empty if it can."""
    if file.is_dir() or not file.absolute().parent.is_dir():
        return f"expected a file in a folder that exists, got {file}; make the folder first"
    try:
        with tempfile.TemporaryFile(dir=file.absolute().parent):
            pass
    except OSError as error:
        return f"expected a file in a folder that can be written to, got {file}: {error.strerror}"
    return ""
