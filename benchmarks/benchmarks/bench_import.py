"""What ``import sparsecore`` costs in a fresh interpreter."""

from __future__ import annotations


def timeraw_import() -> str:
    return "import sparsecore"


timeraw_import.version = "1"  # type: ignore[attr-defined]
