"""Large files: every kind can be written, read in another process, and is told with what it took."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from harness import loading

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_the_command_reads_what_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["loading"])
    monkeypatch.setattr(loading, "_PIECE", 7000)
    app = typer.Typer()
    app.command()(loading.main)
    arguments = ["--rows", "20000", "--scratch", str(tmp_path), "--output", str(tmp_path / "loading")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    kinds = json.loads((tmp_path / "loading.json").read_text())["kinds"]
    assert list(kinds) == list(loading.KINDS)
    # The same pairs in all kinds but the lists, in which a user's items differ.
    assert len({row["pairs"] for kind, row in kinds.items() if kind != "lists of items"}) == 1
    assert all(row["pairs"] > 50 and row["seconds"] > 0 and row["peak"] >= 0 for row in kinds.values())
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md"}
    assert "| csv |" in (tmp_path / "loading.md").read_text()


def test_an_unknown_kind_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    app.command()(loading.main)
    done = CliRunner().invoke(app, ["--only", "csv;tables", "--output", str(tmp_path / "x")])
    assert done.exit_code == 2
    assert "unknown kind 'tables'; expected some of csv; csv, ids are text" in done.output
    monkeypatch.setattr(loading, "_PROGRAM", "1 / 0")
    with pytest.raises(RuntimeError, match="csv: the reading process ended with 1"):
        loading.measure("csv", 1000, tmp_path)
    assert list(tmp_path.iterdir()) == []
