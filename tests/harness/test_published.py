"""Runs beside published values."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from harness.published import command_of, main, rows_of
from recsys.cli import app
from recsys.config import load_config
from recsys.errors import RecsysError
from recsys.reproduce.definition import Published, PublishedResult
from recsys.training import session

TINY = {
    "data.options": {"users": 60, "items": 50, "interactions": 900, "clusters": 4},
    "model.name": "bprmf",
    "model.dim": 8,
    "train.epochs": 1,
}


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (0, 1):
        config = load_config(options={**TINY, "sparsity.method": "dense", "train.seed": seed})
        session.train(config, tmp_path / f"{seed}", quiet=True)
    session.train(load_config(options={**TINY, "sparsity.method": "dsl"}), tmp_path / "dsl", quiet=True)
    made_up = PublishedResult(model="bprmf", dataset="synthetic", values={"ndcg@20": 0.5}, source="nobody")
    monkeypatch.setattr("harness.published.load_published", lambda: Published(about="-", results=[made_up]))
    (row,) = rows_of([tmp_path / "0", tmp_path / "1"])
    assert (row["seeds"], row["epochs"]) == ([0, 1], [1, 1])
    value = row["values"]["ndcg@20"]
    assert value["ratio"] == pytest.approx(value["ours"] / 0.5)
    assert value["spread"] is not None
    with pytest.raises(RecsysError, match="dense run that has ended"):
        rows_of([tmp_path / "dsl"])


def test_the_command_makes_the_same_settings(tmp_path: Path) -> None:
    changes = {
        "train.lr": 0.01,
        "train.batch_size": 8192,
        "data.options.validation": 0,
        "sparsity.method": "dense",
    }
    config = load_config("lightgcn-gowalla", options={**changes, "train.epochs": 7, "train.seed": 3})
    program, *arguments = shlex.split(command_of(config))
    assert program == "recsys"
    assert arguments[:5] == ["train", "--preset", "lightgcn-gowalla", "--method", "dense"]
    missing = CliRunner().invoke(app, [*arguments, "--data-dir", str(tmp_path)])
    assert "gowalla" in missing.output + str(
        missing.exception
    )  # settings are good; only the data is not there
    again = load_config(
        "lightgcn-gowalla",
        overrides=[word for before, word in itertools.pairwise(arguments) if before == "--set"],
        options={"sparsity.method": "dense", "train.epochs": 7, "train.seed": 3},
    )
    assert again == config


def test_runs_with_pretrained_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("harness.published.load_published", lambda: Published(about="-", results=[]))
    tiny = {
        **TINY,
        "model.name": "neumf",
        "model.factors": 4,
        "model.layers": [8, 4],
        "sparsity.method": "dense",
    }
    del tiny["model.dim"]
    for seed in (0, 1):
        seeded = {**tiny, "train.seed": seed}
        for part in ("gmf", "mlp"):
            session.train(
                load_config(options={**seeded, "model.parts": part}), Path(f"{part}{seed}"), quiet=True
            )
        taken = {f"train.pretrained.{part}": f"{part}{seed}" for part in ("gmf", "mlp")}
        session.train(load_config(options={**seeded, **taken}), Path(f"fused{seed}"), quiet=True)
    (row,) = rows_of([Path("fused0"), Path("fused1")])
    assert row["seeds"] == [0, 1]
    assert "--set train.pretrained.gmf=runs/gmf" in row["command"]
    assert set(row["parts"]) == {"gmf", "mlp"}
    assert "--set model.parts=mlp" in row["parts"]["mlp"]
    command = typer.Typer()
    command.command()(main)
    runner = CliRunner().invoke(command, ["fused0", "fused1", "--output", "page"])
    assert runner.exit_code == 0, runner.output
    page = Path("page.md").read_text()
    assert "--output runs/gmf" in page
