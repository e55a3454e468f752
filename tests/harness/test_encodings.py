"""The comparison of encodings on tiny shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from harness import encodings


def test_the_command_writes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--quick", "--threads", "1", "--output", str(tmp_path / "encodings")]
    monkeypatch.setattr("sys.argv", ["encodings", *arguments])
    app = typer.Typer()
    app.command()(encodings.main)
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "encodings.json").read_text())["rows"]
    assert len(rows) == 3 * len(encodings.DENSITIES)
    assert all(ratio > 0 for row in rows for ratio in row["ratio"].values())
    # What the rule rests on: beyond an eighth a uint8 column costs more than a bit for every position.
    assert all(row["csr bits"] > row["bitmap bits"] for row in rows if row["density"] >= 0.25)
    page = (tmp_path / "encodings.md").read_text()
    assert all(f"## {weight}" in page for weight in {row["weight"] for row in rows})
