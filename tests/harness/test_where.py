"""The page "Where it runs" says what the committed test runs say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.where import page

RUN: dict[str, Any] = {
    "machine": {
        "python": "3.11.7", "torch": "2.13.0", "isa": "AVX512", "microarchitecture": "znver4", "date": "2026-01-02",
        "commit": "abc",
    },
    "arguments": ["-m", "not slow", "tests"], "gpu": None, "backend": "by device", "simd": "auto", "interpreted": False,
    "total": {"passed": 7, "skipped": 1}, "features": {"layers": {"passed": 2}, "graphs": {"skipped": 1}},
}  # fmt: skip


def test_marks() -> None:
    broken = RUN | {"backend": "torch", "features": {"layers": {"passed": 2, "failed": 1}}, "gpu": "H200"}
    lines = page({"plain": RUN, "torch": broken}).splitlines()
    assert "| plain | 3.11.7 | 2.13.0 | by device | AVX512 | CPU (znver4) | 7 | 1 | 0 |" in lines
    assert "* plain: 2026-01-02, commit abc, `pytest -m 'not slow' tests`" in lines
    assert "| layers | yes | 1 of 3 fail |" in lines
    assert "| graphs | skipped |  |" in lines
    some = page({"plain": RUN | {"features": {"layers": {"passed": 2, "skipped": 3}}}})
    assert "| layers | 2 pass, 3 skipped |" in some.splitlines()


def test_the_committed_page_is_that_of_the_committed_runs() -> None:
    root = Path(__file__).parents[2]
    files = sorted((root / "results" / "where").glob("*.json"))
    if not files:
        pytest.skip("installed without results")
    runs = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    assert (root / "docs" / "where.md").read_text(encoding="utf-8") == page(runs)
