"""The benchmark of whole steps on a tiny model: every form is timed, and what is missing is missed before that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from harness import steps
from recsys.config import Config
from recsys.errors import DataError


def tiny() -> dict[str, object]:
    data = {"name": "synthetic", "options": {"users": 200, "items": 60, "interactions": 3000}}
    model = {"name": "multvae", "hidden": 16, "latent": 8}
    settings = {"data": data, "model": model, "sparsity": {"interval": 5}, "train": {"batch_size": 16}}
    return steps._probes(Config.model_validate(settings), masked=(0.5,))


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(steps.main)
    return CliRunner().invoke(app, [*arguments, "--threads", "1", "--seconds", "0"])


def test_the_command_writes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(steps.WORKLOADS, "tiny", steps.Workload("tiny MultVAE", tiny, (1.0, 1.0, 1.0)))
    done = run("tiny", "--output", str(tmp_path / "steps"))
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "steps.json").read_text())["workloads"]["tiny"]
    forms = [row["form"] for row in rows]
    assert forms == ["dense", "masked@0.5", "sparse@0.5", "sparse@0.25", "sparse@0.1"]
    assert all(row["ratio"] > 0 and row["with exploration"] > 0 for row in rows)
    assert [row["exploration ms"] > 0 for row in rows] == [False, True, True, True, True]
    page = (tmp_path / "steps.md").read_text()
    assert "tiny MultVAE" in page
    assert "sparse@0.25" in page


def test_missing_data_is_missed_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSECORE_DATA", raising=False)
    monkeypatch.setattr(steps, "measure", lambda *_: pytest.fail("something was measured"))
    done = run("bpr-mf", "lightgcn-gowalla")
    assert isinstance(done.exception, DataError)


def test_an_unknown_workload_names_those_there_are() -> None:
    done = run("bprmf")
    assert done.exit_code == 2
    assert "bpr-mf" in done.output
