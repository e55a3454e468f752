"""Tables of results: definitions, published values, runs, costs and the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from recsys.cli import app
from recsys.config import load_config
from recsys.errors import ConfigError
from recsys.models.settings import MODEL_SETTINGS
from recsys.recommender import SavedRecommender
from recsys.reproduce.definition import load_published, load_table, tables

TABLE = """
title = "A tiny table"
seeds = 2
methods = ["dense", "masked", "dsl"]
densities = [0.5, 0.25]

[[rows]]
preset = "quickstart"
metrics = ["hr@20", "hr@77"]
[rows.set]
"model.hidden" = 32
"model.latent" = 8
"sparsity.interval" = 5
"data.options" = { users = 120, items = 60, interactions = 1800, clusters = 6 }

[[rows]]
preset = "convncf-moon"

[[rows]]
preset = "bprmf-gowalla"
"""


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.delenv("SPARSECORE_DATA", raising=False)
    (tmp_path / "tiny.toml").write_text(TABLE)
    return tmp_path / "tiny.toml"


def call(*arguments):
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, ["reproduce", *map(str, arguments)])


@pytest.mark.parametrize("name", tables())
def test_tables_of_the_package(name):
    table = load_table(name)
    for row in table.rows:
        config = load_config(row.preset, options=row.set)
        assert config.model.name in MODEL_SETTINGS
        assert all(metric.partition("@")[1] for metric in row.metrics or table.metrics)


def test_main_table():
    assert "main" in tables()
    main = load_table("main")
    assert (main.seeds, main.densities) == (3, [0.7, 0.5, 0.25, 0.1])
    assert main.methods == ["dense", "static", "masked", "dsl"]
    rows = [row.preset for row in main.rows]
    groups = {
        ("neumf", "convncf", "cdae", "multvae"): ("ml-1m", "citeulike-t", "foursquare"),
        ("lightgcn", "ultragcn"): ("gowalla", "yelp2018", "amazon-book"),
    }
    expected = [f"{model}-{data}" for group, sets in groups.items() for model in group for data in sets]
    assert rows == [*expected, "popularity-ml-1m", "itemknn-ml-1m", "ease-ml-1m"]


def test_small_table_has_models_beyond_the_six():
    rows = [row.preset for row in load_table("small").rows]
    assert {"sasrec-ml-100k", "bprmf-ml-1m", "itemknn-citeulike-t", "popularity-citeulike-t"} <= set(rows)


def test_the_row_of_the_docs_is_valid(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "recommenders.md").read_text()
    (block,) = re.findall(r"```toml\n(\[\[rows\]\].*?)```", page, re.DOTALL)
    (tmp_path / "t.toml").write_text(f'title = "x"\n{block}')
    (row,) = load_table(str(tmp_path / "t.toml")).rows
    widths = {
        load_config(part.preset, options=part.set).model.dim for part in (row, *row.pretrained.values())
    }
    assert len(widths) == 1


def test_published_values():
    published = load_published()
    assert "so there are none to compare with" in published.about
    assert all(0 < value < 1 for result in published.results for value in result.values.values())
    (lightgcn,) = published.find(load_config("lightgcn-gowalla"))
    assert lightgcn.values == {"recall@20": 0.1830, "ndcg@20": 0.1554}
    neumf = load_config("neumf-ml-1m")
    assert published.find(neumf)[0].values["hr@10"] == 0.705
    for other in ({"protocol": "full"}, {"negatives": 100}):
        assert published.find(neumf.replace(evaluation=other)) == []
    assert published.find(load_config("multvae-ml-1m")) == []


def test_tables_that_are_not_valid(tmp_path):
    with pytest.raises(ConfigError, match="valid: main"):
        load_table("mian")
    with pytest.raises(ConfigError, match="cannot read"):
        load_table(str(tmp_path / "none.toml"))
    for text, match in (("title = ", "not valid TOML"), ('title = "x"\nrows = [{ prest = "a" }]', "prest")):
        (tmp_path / "t.toml").write_text(text)
        with pytest.raises(ConfigError, match=match):
            load_table(str(tmp_path / "t.toml"))


def test_reproduce(table, tmp_path, in_process):
    out, runs = tmp_path / "out" / "table", tmp_path / "runs"
    command = ["--table", table, "-o", out, "--runs", runs, "--epochs", 2, "--timing", 0.02]
    result = call(*command)
    assert result.exit_code == 0, result.output
    assert len(in_process) == 2 * 5
    assert (
        "10 trainings in 1 row, 10 of them to be done; fewer by --only REGEX (such as --only '^quick"
        in result.stderr
    )
    assert "convncf-moon: there is no such preset" in result.stderr
    assert "bprmf-gowalla: the data set gowalla was not found" in result.stderr
    document = json.loads((tmp_path / "out" / "table.json").read_text())
    assert {"command", "machine", "table", "sections", "left_out"} <= set(document)
    (section,) = document["sections"]
    assert section["metrics"] == ["hr@20"]
    assert len(section["runs"]) == 10
    names = [row["cell"] for row in section["summary"]]
    assert names == ["dense", *(f"{m} density={d}" for m in ("masked", "dsl") for d in (0.5, 0.25))]
    cost = section["cost"]
    assert set(cost) == set(names)
    total = {name: sum(one["macs"].values()) for name, one in cost.items()}
    assert total["masked density=0.5"] == total["dense"] > total["dsl density=0.5"]
    assert total["dsl density=0.5"] > total["dsl density=0.25"]
    assert cost["dense"]["step_vs_dense"] == cost["dense"]["recommend_vs_dense"] == 1
    assert all(one["step_ms"] > 0 and one["recommend_ms"] > 0 for one in cost.values())
    page = (tmp_path / "out" / "table.md").read_text()
    assert "**2 epochs in place" in page
    assert "so there are none to compare with" in page
    assert "* convncf-moon: there is no such preset" in page
    assert re.search(r"\| quickstart \| hr@20 \| - \| 0\.\d{4} ± 0\.\d{4} \| masked \| 0\.", page)
    assert re.search(
        r"\| dsl density=0.25 \| 2 \| 0\.\d{4} ± 0\.\d{4} \| \d, \d \| 1,292 \| [\d,]+ \(0\.\d\dx\) \|", page
    )
    widths = {
        line.count("|") for line in page.splitlines() if line.startswith(("| dsl", "| cell", "| dense"))
    }
    assert len(widths) == 1
    assert str(tmp_path) not in page + json.dumps(document)
    # What has ended is not trained again; other lengths are other runs.
    assert call(*command[:-1], 0).exit_code == 0
    assert len(in_process) == 10
    shorter = [*command[:-4], "--epochs", 1, "--timing", 0, "--seeds", 1, "--only", "dsl|dense"]
    assert call(*shorter).exit_code == 0
    assert len(in_process) == 10 + 3
    page = (tmp_path / "out" / "table.md").read_text()
    assert "| dsl density=0.5 | 1 | 0." in page
    # No times, but the multiply-adds that were counted in training.
    shares = re.findall(
        r"^\| dsl density=[\d.]+ \|.* \| \d+\.\d \((0\.\d\d)x\) \| - \| - \|$", page, re.MULTILINE
    )
    assert len(shares) == 2
    assert float(shares[0]) > float(shares[1])


def test_settings_of_chosen_rows_need_not_fit_the_others(table, tmp_path, in_process):
    command = [
        "--table",
        table,
        "-o",
        tmp_path / "t",
        "--runs",
        tmp_path / "runs",
        "--timing",
        0,
        "--epochs",
        1,
    ]
    result = call(*command, "--seeds", 1, "--only", "quickstart dense", "--set", "model.beta_cap=0.1")
    assert result.exit_code == 0, result.output  # BPR-MF, in the table's other row, has no beta_cap
    assert "bprmf" not in result.stderr + (tmp_path / "t.md").read_text()
    refused = call(*command, "--only", "quickstart", "--set", "model.negatives=3")
    assert refused.exit_code == 2
    assert "model.negatives" in refused.stderr


def test_settings_of_rows(tmp_path, in_process):
    (tmp_path / "t.toml").write_text(
        'title = "x"\nmethods = ["dense"]\nseeds = 1\n[[rows]]\npreset = "quickstart"\n'
        "[rows.set]\ntrain.lr = 0.01\nmodel.beta_cap = 0.1\ntrain.epochs = 1\n"
    )
    row = load_table(str(tmp_path / "t.toml")).rows[0]
    assert row.set == {"train.lr": 0.01, "model.beta_cap": 0.1, "train.epochs": 1}
    preset = load_config("quickstart")
    assert load_config("quickstart", options=row.set).train.batch_size == preset.train.batch_size
    command = ["--table", tmp_path / "t.toml", "-o", tmp_path / "t", "--runs", tmp_path / "r", "--timing", 0]
    assert call(*command).exit_code == 0
    page = (tmp_path / "t.md").read_text()
    assert "Other settings than the preset's: `train.lr = 0.01`, `train.epochs = 1`, `model.beta_cap" in page


PARTS = """
title = "x"
seeds = 2
epochs = 1
methods = ["dense", "static", "masked", "dsl"]
densities = [0.5]

[[rows]]
preset = "convncf-ml-1m"
[rows.set]
"model.dim" = 16
"model.channels" = [4, 4]
"model.kernels" = [4, 4]
"evaluation.negatives" = 20
"data.name" = "synthetic"
"data.options" = { users = 120, items = 60, interactions = 1800, clusters = 6 }
[rows.pretrained.bprmf]
preset = "PART"
[rows.pretrained.bprmf.set]
"model.dim" = 16
"train.lr" = 0.03
"evaluation.negatives" = 20
"data.name" = "synthetic"
"data.options" = { users = 120, items = 60, interactions = 1800, clusters = 6 }
"""


def run_config(folder):
    return load_config(path=folder / "config.toml")


def test_rows_begin_with_what_others_have_learnt(tmp_path, in_process):
    table, runs = tmp_path / "t.toml", tmp_path / "runs"
    table.write_text(PARTS.replace("PART", "bprmf-ml-1m"))
    command = ["--table", table, "-o", tmp_path / "t", "--timing", 0, "--runs"]
    result = call(*command, runs, "--only", "dense|static|dsl")
    assert result.exit_code == 0, result.output
    assert "12 trainings in 1 row, 12 of them to be done" in result.stderr
    assert "convncf-ml-1m: begins with 6 runs of bprmf-ml-1m" in result.stderr
    # Parts first, and each run has that of its own method and seed; index sets are the part's until some are moved.
    assert [name.rpartition("-")[0] for name in in_process] == 2 * [
        f"{cell}-seed{seed}" for seed in (0, 1) for cell in ("dense", "static-density0.5", "dsl-density0.5")
    ]
    for name in in_process[6:]:
        part = Path(run_config(runs / "convncf-ml-1m" / name).train.pretrained["bprmf"])
        assert part.parent == (runs / "bprmf-ml-1m").resolve()
        assert part.name.rpartition("-")[0] == name.rpartition("-")[0]
    static = runs / "convncf-ml-1m" / next(name for name in in_process[6:] if name.startswith("static"))
    ours, part = (
        SavedRecommender.load(folder).model
        for folder in (static, run_config(static).train.pretrained["bprmf"])
    )
    assert torch.equal(ours.users.pattern.col, part.users.pattern.col)
    assert not torch.equal(ours.users.values, part.users.values)
    # The same runs elsewhere, and further ones: nothing that has ended is trained again.
    moved = tmp_path / "moved"
    runs.rename(moved)
    result = call(*command, moved)
    assert result.exit_code == 0, result.output
    assert "16 trainings in 1 row, 4 of them to be done" in result.stderr
    assert len(in_process) == 16
    page, document = (tmp_path / "t.md").read_text(), json.loads((tmp_path / "t.json").read_text())
    assert "Begins with what a run of `bprmf-ml-1m` (`model.dim = 16`, `train.lr = 0.03`, " in page
    assert "of the same method, density and seed has learnt (`train.pretrained.bprmf`)." in page
    assert str(tmp_path) not in json.dumps(document["sections"])
    assert document["sections"][0]["pretrained"]["bprmf"]["preset"] == "bprmf-ml-1m"
    table.write_text(PARTS.replace("PART", "bprmf-moon"))
    result = call(*command, moved)
    assert result.exit_code == 2
    assert "convncf-ml-1m: there is no preset bprmf-moon" in result.stderr


def test_yardsticks_are_one_run_each_beside_the_others(tmp_path, in_process):
    data = '"data.options" = { users = 120, items = 60, interactions = 1800, clusters = 6 }'
    rows = [
        f'[[rows]]\npreset = "{preset}"\nmetrics = ["ndcg@20"]\n[rows.set]\n"data.name" = "synthetic"\n{data}\n'
        for preset in ("ease-ml-1m", "quickstart")
    ]
    (tmp_path / "t.toml").write_text(
        'title = "x"\nmethods = ["dense", "dsl"]\ndensities = [0.5]\nseeds = 2\nepochs = 1\n' + "".join(rows)
    )
    command = [
        "--table",
        tmp_path / "t.toml",
        "-o",
        tmp_path / "t",
        "--runs",
        tmp_path / "r",
        "--timing",
        0.02,
    ]
    result = call(*command)
    assert result.exit_code == 0, result.output
    assert len(in_process) == 1 + 2 * 2
    ease = json.loads((tmp_path / "t.json").read_text())["sections"][0]
    assert [row["cell"] for row in ease["summary"]] == ["dense"]
    assert ease["cost"] == {}
    page = (tmp_path / "t.md").read_text()
    value = f"{ease['summary'][0]['test']['ndcg@20']['mean']:.4f}"
    assert f"| ease-ml-1m synthetic | ndcg@20 | - | {value} | - | - |" in page
    assert f"| dense | 1 | {value} |" in page


def test_published_values_stand_beside_ours(table, tmp_path, in_process, monkeypatch):
    from recsys.reproduce import command as module
    from recsys.reproduce import definition

    published = load_published()
    (result,) = published.find(load_config("lightgcn-gowalla"))
    made_up = result.model_copy(
        update={"model": "multvae", "dataset": "synthetic", "values": {"hr@20": 0.1234}, "note": "made up"}
    )
    monkeypatch.setattr(
        module, "load_published", lambda: definition.Published(about="about", results=[made_up])
    )
    command = ["--table", table, "-o", tmp_path / "t", "--runs", tmp_path / "runs", "--timing", 0]
    assert call(*command, "--epochs", 1, "--seeds", 1, "--only", "dense").exit_code == 0
    page = (tmp_path / "t.md").read_text()
    assert "| quickstart | hr@20 | 0.1234 | 0." in page
    assert "| published, dense | | 0.1234 |" in page
    assert "Published: He et al. (2020), LightGCN (made up)." in page


def test_failures_and_what_cannot_be(table, tmp_path, in_process):
    command = ["--table", table, "-o", tmp_path / "t", "--runs", tmp_path / "runs", "--timing", 0]
    failed = call(*command, "--epochs", 3, "--only", "dense", "--seeds", 1, "--set", "train.lr=1e30")
    assert failed.exit_code == 1
    assert "diverged" in failed.stderr
    assert "Failed: dense seed 0: the loss" in (tmp_path / "t.md").read_text()
    for wrong, message in ((["--only", "("], "regular expression"), (["--only", "nothing"], "no run")):
        refused = call(*command, *wrong)
        assert refused.exit_code == 2
        assert message in refused.stderr
