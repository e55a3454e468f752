"""Runs side by side: seeds together, the right reference, and no comparison of what cannot be compared."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from recsys.cli import app
from recsys.compare import Spread, compare_runs
from recsys.errors import RecsysError
from recsys.significance import paired
from recsys.training import session
from recsys.training.refit import refit
from recsys.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """name -> folder: dsl with two seeds, dense, and another density."""
    from recsys.config import load_config

    folder = tmp_path_factory.mktemp("runs")
    base = {
        "data.options": {"users": 120, "items": 60, "interactions": 1800, "clusters": 6},
        "model.name": "bprmf",
        "model.dim": 16,
        "sparsity.density": 0.4,
        "sparsity.interval": 5,
        "train.epochs": 2,
        "train.lr": 0.03,
    }
    changes = {
        "dsl-0": {"sparsity.method": "dsl"},
        "dsl-1": {"sparsity.method": "dsl", "train.seed": 1},
        "dense": {"sparsity.method": "dense"},
        "dsl-small": {"sparsity.method": "dsl", "sparsity.density": 0.2},
        "other-data": {"data.seed": 1},
        "sampled": {"evaluation.protocol": "sampled", "evaluation.negatives": 19},
    }
    for name, change in changes.items():
        session.train(load_config(options={**base, **change}), folder / name, quiet=True)
    return folder


def test_weights_kept_are_counted_where_some_stay_dense(make_config, tmp_path):
    config = make_config("masked", "sparsity.weights=paper", "sparsity.density=0.1", model="neumf")
    for method in ("masked", "dsl"):
        session.train(config.replace(sparsity={"method": method}), tmp_path / method, quiet=True)
    found = compare_runs([tmp_path / "masked", tmp_path / "dsl"])
    metrics = RunFolder(tmp_path / "dsl").metrics()
    kept = metrics["parameters_stored"] / metrics["dense_size"]
    assert [line.kept for line in found.lines] == [kept, kept]
    assert kept > 0.3  # two of four tables, and no layer of the perceptron
    assert metrics["dense_size"] == RunFolder(tmp_path / "masked").metrics()["parameters_stored"]


def call(*arguments):
    return CliRunner(env={"COLUMNS": "400", "NO_COLOR": "1"}).invoke(app, [str(a) for a in arguments])


def test_lines(runs):
    found = compare_runs([runs / name for name in ("dsl-0", "dsl-small", "dense", "dsl-1")])
    assert found.metric == "ndcg@20"
    assert [line.label for line in found.lines] == ["bprmf dense", "bprmf dsl", "bprmf dsl"]
    assert [line.density for line in found.lines] == [1.0, 0.4, 0.2]
    assert [line.kept for line in found.lines] == pytest.approx([1.0, 0.4, 0.2], abs=1e-3)
    assert [line.seeds for line in found.lines] == [(0,), (0, 1), (0,)]
    metrics = {name: RunFolder(runs / name).metrics() for name in ("dense", "dsl-0", "dsl-1")}
    both = [metrics[name]["test"]["recall@20"] for name in ("dsl-0", "dsl-1")]
    dense, dsl, _ = found.lines
    assert dsl.test["recall@20"] == Spread(np.mean(both), np.std(both, ddof=1))
    assert dense.test["recall@20"] == Spread(metrics["dense"]["test"]["recall@20"], None)
    assert dsl.macs < dense.macs == sum(metrics["dense"]["macs_per_step"].values())
    assert dense.resident_bytes == metrics["dense"]["resident_bytes"]["total"]
    values = {name: RunFolder(runs / name).per_user()[1]["ndcg@20"] for name in metrics}
    assert dense.against is None
    assert dsl.against == paired((values["dsl-0"] + values["dsl-1"]) / 2, values["dense"])
    assert json.loads(json.dumps(found.to_dict()))["lines"][1]["against"]["t_p"] == dsl.against.t_p


def test_without_dense_the_first_run_is_the_reference(runs):
    found = compare_runs([runs / "dsl-small", runs / "dsl-0"], metric="recall@20")
    assert [line.density for line in found.lines] == [0.2, 0.4]
    assert found.lines[0].against is None
    assert found.lines[1].against is not None


def test_lines_of_one_density_are_told_apart_by_folder(runs, tmp_path):
    shutil.copytree(runs / "dsl-0", tmp_path / "slow")
    config = (tmp_path / "slow" / "config.toml").read_text()
    (tmp_path / "slow" / "config.toml").write_text(config.replace("lr = 0.03", "lr = 0.01"))
    found = compare_runs([runs / "dsl-0", tmp_path / "slow"])
    assert [line.label for line in found.lines] == ["bprmf dsl (dsl-0)", "bprmf dsl (slow)"]


def test_what_cannot_be_compared(runs, tmp_path):
    for name, why in (("other-data", "data, or another split"), ("sampled", "protocol")):
        with pytest.raises(RecsysError, match=rf"cannot be compared: different {why}"):
            compare_runs([runs / "dense", runs / name])
    with pytest.raises(RecsysError, match="there twice"):
        compare_runs([runs / "dense", runs / "dense"])
    with pytest.raises(RecsysError, match=r"no 'recall@5'; it has: recall@20"):
        compare_runs([runs / "dense"], "recall@5")
    with pytest.raises(RecsysError, match="not the folder of a run"):
        compare_runs([tmp_path])
    with pytest.raises(RecsysError, match="nothing to compare"):
        compare_runs([])
    shutil.copytree(runs / "dense", tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    del metrics["macs_per_step"]
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(RecsysError, match=r"older version.*macs_per_step"):
        compare_runs([tmp_path / "run"])
    (tmp_path / "run" / "metrics.json").unlink()
    with pytest.raises(RecsysError, match="has not ended"):
        compare_runs([tmp_path / "run"])


def test_damaged_values_per_user(runs, tmp_path):
    shutil.copytree(runs / "dense", tmp_path / "run")
    path = tmp_path / "run" / "per_user.npz"
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"nonsense" * 9):
        path.write_bytes(damaged)
        with pytest.raises(RecsysError, match=r"per_user\.npz is damaged"):
            compare_runs([tmp_path / "run"])
    path.unlink()
    with pytest.raises(RecsysError, match="does not exist"):
        compare_runs([tmp_path / "run"])


def test_command(runs, tmp_path):
    before = set(sys.modules)
    names = [runs / name for name in ("dsl-0", "dense", "dsl-1")]
    result = call("compare", *names, "--json", tmp_path / "c.json", "--plot", tmp_path / "c.png")
    assert result.exit_code == 0, result.output
    assert "synthetic, test, full ranking" in result.output
    lines = json.loads((tmp_path / "c.json").read_text())["lines"]
    rows = [line for line in result.output.splitlines() if line.startswith(" bprmf")]
    assert [row.split()[:3] for row in rows] == [
        ["bprmf", method, density]
        for method, density in (
            ("dense", "1"),
            ("dsl", "0.4"),
            ("dsl", "0.4"),
            ("dense", "1"),
            ("dsl", "0.4"),
        )
    ]
    assert rows[0].split()[3:] == [
        "1",
        *(f"{lines[0]['test'][f'{m}@20']['mean']:.4f}" for m in ("ndcg", "recall")),
    ]
    assert f"{lines[1]['test']['ndcg@20']['mean']:.4f}±" in rows[1]
    assert f"{lines[1]['against']['difference']:+.4f}" in rows[2]
    assert f"{lines[1]['macs'] / 1e6:.3g}" in rows[4]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert call("compare", *names, "--plot", tmp_path / "c.svg").exit_code == 0
    drawn = (tmp_path / "c.svg").read_text()
    assert "<svg" in drawn
    for cost in (
        "fraction of weights kept",
        "million multiply-adds a step",
        "resident MB in training",
        "seconds of training",
    ):
        assert f"<!-- {cost} -->" in drawn  # matplotlib draws letters, and says in a comment what they are
    assert "matplotlib.pyplot" not in set(sys.modules) - before


def test_nothing_is_cut_off_in_80_columns(runs):
    names = [str(runs / name) for name in ("dsl-0", "dense", "dsl-1", "dsl-small")]
    output = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"}).invoke(app, ["compare", *names]).output
    assert "…" not in output
    assert len([line for line in output.splitlines() if line.startswith(" bprmf")]) == 3 + 2 + 3


def test_errors_of_the_command_are_one_line(runs, tmp_path, monkeypatch):
    def refused(*arguments):
        result = call("compare", runs / "dense", *arguments)
        assert result.exit_code == 2, result.output
        (line,) = result.stderr.strip().splitlines()
        return line

    assert "different protocol" in refused(runs / "sampled")
    assert ".png or .svg" in refused("--plot", tmp_path / "c.pdf")
    assert "cannot write" in refused("--json", tmp_path / "none" / "c.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "sparsecore[plot]" in refused("--plot", tmp_path / "c.png")
    assert list(tmp_path.iterdir()) == []


def test_tables_say_the_protocol(runs):
    assert "sampled ranking, 19 negatives a target" in call("evaluate", runs / "sampled").output
    assert "full ranking" in call("evaluate", runs / "dense").output
    assert "sampled ranking, 19 negatives a target" in " ".join(
        call("compare", runs / "sampled").output.split()
    )


def test_what_does_not_decide_the_figures_does_not_tell_lines_apart(runs, tmp_path):
    config = RunFolder(runs / "dsl-1").config()
    moved = config.replace(
        data={"name": "/elsewhere/own.csv"},
        train={"tensorboard": True, "device": "cuda"},
        evaluation={"batch_size": 9},
    )
    shutil.copytree(runs / "dsl-1", tmp_path / "moved")
    (tmp_path / "moved" / "config.toml").write_text(moved.to_toml())
    metrics = RunFolder(runs / "dsl-1").metrics()
    metrics["dataset"]["name"] = "/elsewhere/own.csv"
    RunFolder(tmp_path / "moved").save_metrics(metrics)
    assert [line.seeds for line in compare_runs([runs / "dsl-0", tmp_path / "moved"]).lines] == [(0, 1)]


def test_pretrained_runs_are_told_apart_by_their_parts(runs, tmp_path):
    """Parts of another density make another run; the folder that one was in does not."""
    config = RunFolder(runs / "dense").config()
    folders = []
    for seed, source in ((0, "dsl-0"), (1, "dsl-small"), (2, "dsl-1"), (3, "gone")):
        folders.append(tmp_path / f"{seed}")
        shutil.copytree(runs / "dense", folders[-1])
        taken = {"pretrained": {"all": str(runs / source / "recommender")}, "seed": seed}
        (folders[-1] / "config.toml").write_text(config.replace(train=taken).to_toml())
    assert [line.seeds for line in compare_runs(folders).lines] == [(0, 2), (1,), (3,)]


def test_seeds_of_pretrained_runs_are_one_line(runs, tmp_path):
    """Each seed took its weights from a run of its own."""
    config = RunFolder(runs / "dense").config()
    folders = []
    for seed, source in ((0, "dsl-0"), (1, "dsl-1")):
        taken = {"pretrained": {"all": str(runs / source)}, "seed": seed}
        folders.append(tmp_path / f"{seed}")
        copy = folders[-1]
        shutil.copytree(runs / "dense", copy)
        (copy / "config.toml").write_text(config.replace(train=taken).to_toml())
    assert RunFolder(folders[0]).config().train.pretrained
    assert [line.seeds for line in compare_runs(folders).lines] == [(0, 1)]


def test_refits_of_several_seeds_are_one_line_wherever_they_stopped(make_config, tmp_path, monkeypatch):
    for seed, best in ((0, 1), (1, 2)):
        config = make_config("dsl", "train.epochs=2", f"train.seed={seed}")
        session.train(config, tmp_path / f"{seed}", quiet=True)
        metrics = RunFolder(tmp_path / f"{seed}").metrics()
        RunFolder(tmp_path / f"{seed}").save_metrics({**metrics, "best_epoch": best})
        refit(tmp_path / f"{seed}", tmp_path / f"{seed}-all", quiet=True)
    (line,) = compare_runs([tmp_path / "0-all", tmp_path / "1-all"]).lines
    assert line.seeds == (0, 1)
    with pytest.raises(RecsysError, match="a refit has another train part"):
        compare_runs([tmp_path / "0", tmp_path / "0-all"])


def test_folders_of_one_name_are_told_apart(make_config, tmp_path):
    for name, rate in (("a", 0.01), ("b", 0.02)):
        config = make_config("dsl", "train.epochs=1", f"train.lr={rate}")
        session.train(config, tmp_path / name / "run", quiet=True)
    found = compare_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert [line.label for line in found.lines] == ["multvae dsl (a/run)", "multvae dsl (b/run)"]
