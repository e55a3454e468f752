"""Sweeps: which runs a grid has, what is repeated and what is not, tables, the best cell, pictures."""

from __future__ import annotations

import json
import statistics
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from recsys.cli import app
from recsys.config import load_config
from recsys.errors import ConfigError, DataError, OutputExistsError
from recsys.sweep import heatmap, make_grid, parse_axis, summarise
from recsys.sweep.engine import Plan, run_cells
from recsys.sweep.summary import best_row, markdown_table, plus_minus, shown_metrics, terminal_tables
from recsys.training import session
from recsys.training.run_folder import RunFolder

SMALL = [
    *("--set", "data.options={users=120, items=60, interactions=1800, clusters=6}"),
    *("--set", "model.hidden=32", "--set", "model.latent=8", "--set", "sparsity.interval=5"),
    *("--set", "train.epochs=2"),
]


def grid_of(*axes, seeds=1, options=None):
    def make_config(variation):
        return load_config(options=options, variation=variation)

    return make_grid(make_config, [parse_axis(axis) for axis in axes], seeds)


def call(*arguments):
    return CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1"}).invoke(app, [str(a) for a in arguments])


def refused(*arguments):
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sparsity.density=0.5,0.25", ("sparsity.density", [0.5, 0.25])),
        ("sparsity.method=dense,dsl", ("sparsity.method", ["dense", "dsl"])),
        ('data.name="a,b","c"', ("data.name", ["a,b", "c"])),
        ("train.ks=[10],[10, 20]", ("train.ks", [[10], [10, 20]])),
        (" train.lr = 1e-3 ", ("train.lr", [1e-3])),
        ("sparsity.method=dense,dsl,", ("sparsity.method", ["dense", "dsl"])),
    ],
)
def test_axes(text, expected):
    assert parse_axis(text) == expected


@pytest.mark.parametrize("text", ["sparsity.density", "=1", "train.lr=", ""])
def test_axes_that_are_none(text):
    with pytest.raises(ConfigError, match="expects"):
        parse_axis(text)


def test_a_setting_is_not_varied_where_the_method_does_not_read_it():
    grid = grid_of(
        "sparsity.method=dense,static,dsl",
        "sparsity.density=0.5,0.25",
        "sparsity.interval=10,20",
        seeds=2,
    )
    names = [cell.name for cell in grid.cells]
    assert names[: len(names) // 2] == [
        "dense",
        "static density=0.5",
        "static density=0.25",
        "dsl density=0.5 interval=10",
        "dsl density=0.5 interval=20",
        "dsl density=0.25 interval=10",
        "dsl density=0.25 interval=20",
    ]
    assert names[: len(names) // 2] == names[len(names) // 2 :]
    assert [cell.seed for cell in grid.cells] == [0] * 7 + [1] * 7
    assert len({cell.folder for cell in grid.cells}) == len({cell.config.hash for cell in grid.cells}) == 14
    # Every point of the product has its cell all the same.
    assert len(grid.names) == 12
    assert dict(grid.names)[("dense", 0.25, 20)] == "dense"


def test_what_is_not_read_does_not_make_runs():
    fitted = grid_of("model.name=ease,popularity", "sparsity.method=dense,dsl", "sparsity.density=0.5,0.25")
    assert [cell.config.sparsity.method for cell in fitted.cells] == ["dense", "dense"]
    named = {"sparsity.method": "dsl", "sparsity.include": ["output"]}
    assert len(grid_of("sparsity.weights=full,paper", options=named).cells) == 1
    whole = {"sparsity.method": "dsl", "sparsity.density": 1.0}
    assert len(grid_of("sparsity.grow=gradient,random", options=whole).cells) == 1


def test_equal_values_are_one_run_and_folders_can_be_read():
    grid = grid_of("sparsity.density=0.5,0.50", "train.lr=1e-3,2e-3", options={"train.seed": 7}, seeds=2)
    assert [cell.seed for cell in grid.cells] == [7, 7, 8, 8]
    first = grid.cells[0]
    assert first.folder == f"density0.5-lr0.001-seed7-{first.config.hash[:8]}"


def test_keys_with_one_last_part_are_named_in_full():
    (cell,) = grid_of("data.seed=3", "model.latent=5").cells
    assert cell.name == "seed=3 latent=5"
    names = grid_of("data.options.users=9", "data.options.items=9").cells[0].name
    assert names == "users=9 items=9"
    (nothing,) = grid_of().cells
    assert nothing.name == "dsl"


def test_grids_that_cannot_be():
    with pytest.raises(ConfigError, match="given twice"):
        grid_of("train.lr=1e-3", "train.lr=1e-2")
    with pytest.raises(ConfigError, match="--seeds"):
        grid_of("train.seed=1,2")
    with pytest.raises(ConfigError, match="did you mean 'lr'"):
        grid_of("train.lrr=1,2")
    with pytest.raises(ConfigError, match="less than or equal to 1"):
        grid_of("sparsity.density=0.5,2")


def test_sweep_from_the_command_line(tmp_path, in_process):
    out = tmp_path / "sweep"
    command = ["sweep", *SMALL, "--grid", "sparsity.method=dense,dsl", "--grid", "sparsity.density=0.5,0.25"]
    command += ["--seeds", 2, "-o", out, "--best", "ndcg@20", "--plot", tmp_path / "map.svg"]
    result = call(*command)
    assert result.exit_code == 0, result.output
    assert len(in_process) == 6
    document = json.loads((out / "sweep.json").read_text())
    assert [(run["cell"], run["seed"]) for run in document["runs"]] == [
        *(("dense", 0), ("dsl density=0.5", 0), ("dsl density=0.25", 0)),
        *(("dense", 1), ("dsl density=0.5", 1), ("dsl density=0.25", 1)),
    ]
    assert document["failed"] == []
    assert document["threads"] >= 1
    row = document["summary"][1]
    values = [run["test"]["ndcg@20"] for run in document["runs"] if run["cell"] == row["cell"]]
    assert row["test"]["ndcg@20"] == {
        "mean": pytest.approx(statistics.mean(values)),
        "sd": pytest.approx(statistics.stdev(values)),
    }
    assert row["settings"] == {"sparsity.method": "dsl", "sparsity.density": 0.5}
    metrics = json.loads((out / document["runs"][1]["folder"] / "metrics.json").read_text())
    assert row["parameters_stored"] == metrics["parameters_stored"]
    assert row["bytes"] == metrics["resident_bytes"]["total"]
    assert row["macs"] == pytest.approx(sum(metrics["macs_per_step"].values()))
    page = (out / "sweep.md").read_text()
    assert plus_minus(row["test"]["ndcg@20"]) in page
    dense = document["summary"][0]
    assert f"| {row['macs'] / 1e6:,.1f} ({row['macs'] / dense['macs']:.0%}) |" in page
    assert str(tmp_path) not in page + json.dumps(document)  # nobody's folders
    best = max(document["summary"], key=lambda row: row["validation"]["ndcg@20"]["mean"])
    assert f"Best by validation ndcg@20: {best['cell']} (validation" in result.stdout
    assert plus_minus(row["test"]["recall@20"]) in result.stdout
    ElementTree.parse(tmp_path / "map.svg")
    # A summary of before multiply-adds were kept still makes tables.
    older = [{key: value for key, value in one.items() if key != "macs"} for one in document["summary"]]
    assert all(" | - | " in line for line in markdown_table(older, ["ndcg@20"])[2:])
    assert terminal_tables(older, ["ndcg@20"], "older")
    # Once more: nothing is trained, and the figures are the same.
    again = call(*command)
    assert again.exit_code == 0
    assert len(in_process) == 6
    assert "6 of 6 runs have ended already" in again.stderr
    assert json.loads((out / "sweep.json").read_text())["summary"] == document["summary"]
    # Nor does a run of before they were counted keep the others from a table.
    place = out / document["runs"][1]["folder"] / "metrics.json"
    place.write_text(json.dumps({key: value for key, value in metrics.items() if key != "macs_per_step"}))
    assert call(*command).exit_code == 0
    assert json.loads((out / "sweep.json").read_text())["summary"][1]["macs"] is None
    # One more seed trains what is new.
    command[command.index("--seeds") + 1] = 3
    assert call(*command).exit_code == 0
    assert len(in_process) == 9


def test_settings_by_option_and_tables_for_80_columns(tmp_path, in_process):
    command = ["sweep", *SMALL[:2], "--model", "bprmf", "--method", "dsl", "--density", 0.5, "--epochs", 1]
    command += [
        "--set",
        "train.ks=[10, 20]",
        "--grid",
        "sparsity.interval=50,100",
        "--grid",
        "train.lr=0.01,0.02",
    ]
    out = tmp_path / "sweep"
    result = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"}).invoke(
        app, [*map(str, command), "--seeds", "2", "-o", str(out), "--quiet"]
    )
    assert result.exit_code == 0, result.output
    (run, *_) = json.loads((out / "sweep.json").read_text())["runs"]
    config = RunFolder(out / run["folder"]).config()
    assert (config.model.name, config.sparsity.method, config.sparsity.density) == ("bprmf", "dsl", 0.5)
    assert config.train.epochs == 1
    (row, *_) = json.loads((out / "sweep.json").read_text())["summary"]
    for shown in (
        *(plus_minus(row["test"][f"{name}@{k}"]) for name in ("recall", "ndcg") for k in (10, 20)),
    ):
        assert shown in result.output  # on one line each, whole
    assert f"{row['parameters_stored']:,}" in result.output
    assert row["cell"] in result.output


def test_a_failed_run_is_reported_and_the_others_are_made(tmp_path, in_process):
    out = tmp_path / "sweep"
    command = ["sweep", *SMALL, "--grid", "train.lr=1e30,1e-3", "--set", "sparsity.method=dense", "-o", out]
    for _ in range(2):
        result = call(*command)
        assert result.exit_code == 1
        assert "failed: lr=1e+30 seed 0" in result.stderr
        assert "diverged" in result.stderr
        document = json.loads((out / "sweep.json").read_text())
        assert [run["cell"] for run in document["runs"]] == ["lr=0.001"]
        assert "diverged" in document["failed"][0]["error"]
        assert "lr=1e+30 seed 0" in (out / "sweep.md").read_text()
    assert len(in_process) == 3  # the ended one was not repeated, the failed one was


def test_all_failed(tmp_path, in_process):
    result = call("sweep", *SMALL, "--grid", "train.lr=1e30", "--best", "ndcg@20", "-o", tmp_path / "s")
    assert result.exit_code == 1
    assert "diverged" in result.stderr
    assert "--best" not in result.stderr
    assert "No run has ended." in (tmp_path / "s" / "sweep.md").read_text()


def test_an_unexpected_error_keeps_its_traceback(tmp_path, in_process, monkeypatch):
    def bug(*args, **kwargs):
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(session, "train", bug)
    assert call("sweep", *SMALL, "-o", tmp_path / "s").exit_code == 1
    (failure,) = json.loads((tmp_path / "s" / "sweep.json").read_text())["failed"]
    assert failure["error"] == "ZeroDivisionError: a bug of ours"
    assert "Traceback" in failure["traceback"]


def test_nothing_is_trained_for_what_cannot_be(tmp_path, in_process):
    out = tmp_path / "s"
    assert "not computed" in refused("sweep", *SMALL, "--best", "ncdg@20", "-o", out)
    assert "not computed" in refused("sweep", *SMALL, "--metric", "ndcg@7", "-o", out)
    assert "two settings" in refused("sweep", *SMALL, "--plot", "x.svg", "-o", out)
    axes = ("--grid", "train.lr=1e-3,1e-2", "--grid", "model.latent=5,8")
    assert "ending in" in refused("sweep", *SMALL, *axes, "--plot", "x.jpeg", "-o", out)
    assert "unknown key" in refused("sweep", *SMALL, "--grid", "model.latnt=5,8", "-o", out)
    assert "has none; give the split a validation part" in refused(
        "sweep", *SMALL, "--set", "data.options.validation=0", "--best", "ndcg@20", "-o", out
    )
    (tmp_path / "file").write_text("")
    assert "file is not a folder; choose another --output" in refused(
        "sweep", *SMALL, "-o", tmp_path / "file"
    )
    assert "file is not a folder" in refused("sweep", *SMALL, "-o", tmp_path / "file" / "s")
    assert in_process == []
    assert not out.exists()


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"sparsecore\[plot\]"):
        heatmap.check_plot(grid_of("train.lr=1,2", "model.latent=5,8"), Path("x.svg"))


def test_runs_of_other_settings_are_refused(make_config, tmp_path, in_process):
    grid = make_grid(lambda v: make_config("dense", "train.epochs=1").replace(train=seed_of(v)), [], 1)
    (cell,) = grid.cells
    place = tmp_path / cell.folder
    place.mkdir()
    (place / "config.toml").write_text(make_config("dense", "train.epochs=2").to_toml())
    with pytest.raises(OutputExistsError, match="other settings"):
        run_cells([cell], tmp_path)
    (place / "config.toml").unlink()
    (place / "thesis.txt").write_text("x")
    with pytest.raises(OutputExistsError):
        run_cells([cell], tmp_path)
    assert in_process == []


def test_runs_of_changed_data_are_not_put_into_one_table(make_config, tmp_path, in_process):
    rows = [f"{user},{item}" for user in range(30) for item in range(user % 3, 20, 2)]
    file = tmp_path / "own.csv"
    file.write_text("\n".join(["user,item", *rows]))
    config = make_config("dense", f"data.name={file}", "data.options={}", "train.epochs=1", model="bprmf")
    one, two = make_grid(lambda v: config.replace(train=seed_of(v)), [], 2).cells
    run_cells([one], tmp_path / "sweep")
    file.write_text("\n".join(["user,item", *rows[:-1]]))
    with pytest.raises(DataError, match="no longer the data"):
        run_cells([one, two], tmp_path / "sweep")
    assert len(in_process) == 1
    session.train(two.config, tmp_path / "sweep" / "by-hand", quiet=True)
    with pytest.raises(DataError, match="trained on different data"):
        run_cells([one, two], tmp_path / "sweep")


def test_files_of_one_name_are_not_taken_for_one_another(make_config, tmp_path, in_process):
    """The hash of the settings does not know the folder of a file."""
    files = [tmp_path / name / "own.csv" for name in ("a", "b")]
    for count, file in enumerate(files):
        file.parent.mkdir()
        rows = [f"{user},{item}" for user in range(30 + count) for item in range(user % 3, 20, 2)]
        file.write_text("\n".join(["user,item", *rows]))
    with pytest.raises(ConfigError, match="have one name"):
        grid_of(f"data.name={files[0]},{files[1]}")
    (one, other) = (
        make_config("dense", f"data.name={file}", "data.options={}", "train.epochs=1", model="bprmf")
        for file in files
    )
    run_cells(make_grid(lambda v: one.replace(train=seed_of(v)), [], 1).cells, tmp_path / "sweep")
    cells = make_grid(lambda v: other.replace(train=seed_of(v)), [], 1).cells
    with pytest.raises(DataError, match="no longer the data"):
        run_cells(cells, tmp_path / "sweep")
    files[1].write_text(files[0].read_text())
    run_cells(cells, tmp_path / "sweep")
    assert len(in_process) == 1


def seed_of(variation):
    return {key.removeprefix("train."): value for key, value in variation.items()}


def test_a_run_is_found_by_its_settings_whatever_its_name(make_config, tmp_path, in_process):
    config = make_config("dense", "train.epochs=1")
    session.train(config, tmp_path / "by-hand", quiet=True)
    (cell,) = make_grid(lambda v: config.replace(train=seed_of(v)), [], 1).cells
    plan = Plan.of([cell], tmp_path)
    assert plan.place(cell) == tmp_path / "by-hand"
    assert plan.open == []
    assert run_cells([cell], tmp_path).runs[0]["folder"] == "by-hand"
    assert in_process == []


def test_interrupted_runs_are_continued(make_config, tmp_path, in_process):
    config = make_config("dsl", "train.epochs=4")
    (cell,) = make_grid(lambda v: config.replace(train=seed_of(v)), [], 1).cells
    epochs = []

    def interrupt(event):
        if event.kind == "epoch":
            epochs.append(event.record["epoch"])
            if len(epochs) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cells([cell], tmp_path, on_event=interrupt)
    (run,) = run_cells([cell], tmp_path, on_event=interrupt).runs
    assert epochs == [1, 2, 3, 4]
    assert run["test"] == session.train(config, quiet=True)["test"]


def row(cell, mean, method="dsl"):
    return {
        "cell": cell,
        "settings": {"sparsity.method": method},
        "validation": {"ndcg@20": {"mean": mean, "sd": None}},
        "test": {"ndcg@20": {"mean": 1 - mean, "sd": 0.1}, "recall@5": {"mean": 0, "sd": None}},
    }


def test_the_best_is_chosen_by_validation():
    rows = [row("a", 0.2), row("b", 0.3), row("c", 0.1)]
    assert best_row(rows, "ndcg@20")["cell"] == "b"
    with pytest.raises(ConfigError, match="no run has it"):
        best_row(rows, "hr@20")
    assert shown_metrics(rows, "ndcg@20") == ["ndcg@20", "recall@5"]
    assert shown_metrics(rows, "ndcg@20", ["recall@5"]) == ["recall@5"]
    assert plus_minus(rows[0]["test"]["ndcg@20"]) == "0.8000 ± 0.1000"
    assert plus_minus(rows[0]["validation"]["ndcg@20"]) == "0.2000"
    assert plus_minus(None) == "-"
    assert summarise([]) == []


def test_heat_map_has_a_number_for_every_point(tmp_path):
    grid = grid_of("sparsity.method=dense,dsl", "train.epochs=3", "sparsity.density=0.5,0.25,0.1")
    rows = [row("dense epochs=3", 0.25), row("dsl epochs=3 density=0.5", 0.5)]
    rows.append(row("dsl epochs=3 density=0.1", 0.75))
    values = heatmap.heat_values(grid, rows, "ndcg@20")
    np.testing.assert_equal(values, [[0.75, 0.75, 0.75], [0.5, np.nan, 0.25]])
    files = [tmp_path / "sub" / name for name in ("a.svg", "b.svg", "c.png", "d.pdf")]
    for file in files:
        heatmap.draw_heatmap(grid, rows, "ndcg@20", file, "title")
    text = files[0].read_text()
    assert text.count("0.7500") == 3
    assert text.count("0.2500") == 1
    assert "title: test ndcg@20" in text
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[2].read_bytes().startswith(b"\x89PNG")
    heatmap.draw_heatmap(grid, [], "ndcg@20", files[0])  # all failed: an empty picture
    assert "matplotlib.pyplot" not in sys.modules


def test_values_that_make_one_run_are_refused():
    def make(given):
        return load_config(options={"data.dir": "v1", **given})

    with pytest.raises(ConfigError, match="would be one run"):
        make_grid(make, [("data.dir", ["v1", "v2"])], 1)
