"""The commands, as they are typed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console
from typer.testing import CliRunner

from recsys.cli import app
from recsys.config import Config, load_config
from recsys.quickstart import Row, verdict
from recsys.quickstart import run as run_quickstart
from recsys.training import session
from recsys.training.run_folder import RunFolder
from recsys.training.trainer import Trainer

pytestmark = pytest.mark.feature("command line")

SMALL = [
    *("--set", "data.options={users=120, items=60, interactions=1800, clusters=6}"),
    *("--set", "model.hidden=32", "--set", "model.latent=8", "--set", "sparsity.interval=5"),
]


def call(*arguments):
    # A terminal wide enough that no line of output is folded.
    return CliRunner(env={"COLUMNS": "400", "NO_COLOR": "1"}).invoke(app, [str(a) for a in arguments])


def refused(*arguments):
    """The line on stderr of a command that must end with exit code 2."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.output
    return lines[0]


@pytest.fixture
def finished(tmp_path):
    """Folder of a run that has ended."""
    result = call("train", *SMALL, "--epochs", 2, "--output", tmp_path / "run", "--density", 0.4, "--quiet")
    assert result.exit_code == 0, result.output
    return tmp_path / "run"


def test_help_imports_nothing_heavy():
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from recsys.cli import app\n"
        "assert 'quickstart' in CliRunner().invoke(app, ['--help']).output\n"
        "print([m for m in ('numba', 'torch', 'scipy', 'sparsecore', 'pydantic') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_tells_the_defaults():
    shown = " ".join(re.sub(r"[^\w.,';()-]+", " ", call("train", "--help").output).split())
    defaults, fitted = Config(), load_config(options={"model.name": "ease"})
    for value in (
        defaults.data.name,
        defaults.model.name,
        f"{defaults.sparsity.method} ({fitted.sparsity.method} for popularity, itemknn and ease)",
        f"{defaults.sparsity.density:g}",
        str(defaults.train.epochs),
        str(defaults.train.seed),
        defaults.train.device,
    ):
        assert re.search(rf"preset's, else {re.escape(value)}\.(?!\d)", shown), value


def test_names_in_brackets_are_printed_as_they_are(tmp_path):
    place = tmp_path / "[red] runs [1]"
    assert str(place / "missing") in refused("evaluate", place / "missing")
    result = call("quickstart", "--output", place, "--set", "train.epochs=1", "--timing", 0)
    assert result.exit_code == 0, result.output
    assert str(place) in result.stdout


def test_more_threads_than_can_be_started_are_refused():
    result = call("train", "--threads", 50_000)
    assert result.exit_code == 2
    assert "1024" in result.stderr


def test_train_then_evaluate_then_recommend(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    evaluated = call("evaluate", finished)
    assert evaluated.exit_code == 0
    assert f"{metrics['test']['ndcg@20']:.4f}" in evaluated.output
    assert f"{metrics['validation']['recall@20']:.4f}" in evaluated.output
    recommended = call("recommend", finished, "--user", "u0007", "-k", 3)
    assert recommended.exit_code == 0
    assert re.findall(r"^ +(\d)  (i\d{4})  -?\d+\.\d{4}$", recommended.output, re.MULTILINE)[2][0] == "3"
    folded = call("recommend", finished, "--item", "i0001", "--item", "i0002", "-k", 2)
    assert len(folded.output.splitlines()) == 2


def test_train_prints_epochs_and_where_the_run_is(tmp_path):
    result = call("train", *SMALL, "--epochs", 2, "--method", "masked", "--seed", 5, "-o", tmp_path / "run")
    assert "epoch    2  loss" in result.output
    assert str(tmp_path / "run") in result.output
    config = (tmp_path / "run" / "config.toml").read_text()
    assert 'method = "masked"' in config
    assert "seed = 5" in config


def test_default_output_is_named_after_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("train", *SMALL, "--epochs", 1, "--quiet").exit_code == 0
    assert (tmp_path / "runs" / "synthetic-multvae-dsl-seed0" / "metrics.json").is_file()


def test_config_file(tmp_path):
    (tmp_path / "c.toml").write_text('[model]\nname = "lightgcn"\ndim = 8\n[train]\nepochs = 1\n')
    result = call("train", "--config", tmp_path / "c.toml", *SMALL[:2], "-o", tmp_path / "run", "--quiet")
    assert result.exit_code == 0, result.output
    assert "dim = 8" in (tmp_path / "run" / "config.toml").read_text()


def test_options_of_a_preset_that_are_left_out_are_told_of(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user,item,timestamp\n" + "".join(f"{n % 9},{n % 7},{n}\n" for n in range(90)))
    arguments = [
        "--preset",
        "sasrec-ml-100k",
        "--dataset",
        path,
        "--epochs",
        1,
        "--set",
        "train.evaluate_every=1",
    ]
    result = call("train", *arguments, "--quiet", "-o", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "the preset's options for its own data, {'split': 'loo'}, are not taken for" in result.output
    given = call("train", *arguments, "--set", "data.options.split=loo", "--quiet", "-o", tmp_path / "loo")
    assert given.exit_code == 0, given.output
    assert "the preset's options" not in given.output


def test_errors_are_one_line(tmp_path, finished):
    out = tmp_path / "out"
    assert "did you mean 'lr'" in refused("train", "--set", "train.lrr=1", "-o", out)
    assert "did you mean 'quickstart'" in refused("train", "--preset", "quickstat", "-o", out)
    assert "syntetic" in refused("train", "--dataset", "syntetic", "-o", out)
    assert "does not exist" in refused("train", "--dataset", "x", "--data-dir", tmp_path / "none", "-o", out)
    assert "less than or equal to 1" in refused("train", "--density", 2, "-o", out)
    # Raised by sparsecore, not by recsys.
    assert "no nonzero" in refused("train", *SMALL, "--density", 1e-7, "-o", out)
    assert not out.exists()
    assert "--overwrite" in refused("train", *SMALL, "-o", finished)
    assert "--overwrite" in refused("quickstart", *SMALL, "-o", finished)
    assert "full ranking" in refused("quickstart", *SMALL, "--set", "evaluation.protocol=sampled")
    assert "nearest is u0" in refused("recommend", finished, "--user", "u00077")
    assert "either" in refused("recommend", finished)
    assert "at least 1" in refused("recommend", finished, "--user", "u0007", "-k", 0)
    assert "not the folder of a run" in refused("evaluate", out)
    assert "missing" in refused("recommend", out, "--user", "u0007")
    assert "--resume" in refused("train", "--resume", "--seed", 3, "-o", finished)
    assert "--resume" in refused("train", "--resume")
    assert "not the folder of a run" in refused("train", "--resume", "-o", out)


def test_dense_keeps_all_weights():
    for command in (["train"], ["sweep", "-o", "x"]):
        assert "--density is of the methods" in refused(*command, "--method", "dense", "--density", 0.1)


def test_other_errors_keep_their_traceback(monkeypatch, tmp_path):
    def bug(*args, **kwargs):
        raise ValueError("a bug of ours")

    monkeypatch.setattr(session, "train", bug)
    result = call("train", "-o", tmp_path / "run")
    assert type(result.exception) is ValueError


def test_overwrite(finished):
    before = json.loads((finished / "metrics.json").read_text())
    assert call("train", *SMALL, "--epochs", 1, "--overwrite", "-o", finished, "--quiet").exit_code == 0
    assert json.loads((finished / "metrics.json").read_text())["epochs"] == 1 != before["epochs"]


def test_ctrl_c_then_resume(tmp_path, monkeypatch):
    original = Trainer.run_epoch

    def interrupted(self, *args):
        if self.epoch == 2:
            raise KeyboardInterrupt
        return original(self, *args)

    arguments = ("train", *SMALL, "--epochs", 4, "--quiet")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_epoch", interrupted)
        result = call(*arguments, "-o", tmp_path / "run")
    assert result.exit_code == 130
    assert "after 2 epochs" in result.stderr
    command = re.search(r"recsys (train --resume --output \S+)", result.stderr)
    assert command is not None
    so_far = call("evaluate", tmp_path / "run")  # of validation alone: there is something to choose yet
    assert "validation" in so_far.output
    assert "scored once" in so_far.output
    assert not re.search(r"│ +test ", so_far.output)
    resumed = call(*command.group(1).split(), "--quiet")
    assert resumed.exit_code == 0, resumed.output
    assert call(*arguments, "-o", tmp_path / "whole").exit_code == 0
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "whole")]
    assert metrics[0]["test"] == metrics[1]["test"]
    assert metrics[0]["epochs"] == metrics[1]["epochs"] == 4


def test_ctrl_c_before_anything_is_written(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "load", interrupt)
    result = call("train", "-o", tmp_path / "run")
    assert result.exit_code == 130
    assert "nothing was written" in result.stderr
    assert not (tmp_path / "run").exists()


def test_threads_are_set_once_for_torch(finished):
    program = (
        "import sys, torch\n"
        "from typer.testing import CliRunner\n"
        "from recsys.cli import app\n"
        "print(CliRunner().invoke(app, sys.argv[1:]).exit_code, torch.get_num_threads())\n"
    )
    arguments = ["evaluate", str(finished), "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0", "1"]


def test_quickstart_prints_one_table_and_recommends(tmp_path):
    out = tmp_path / "run"
    settings = [*SMALL, "--set", "train.epochs=3", "--set", "sparsity.density=0.4"]
    result = call("quickstart", *settings, "--output", out, "--quiet", "--timing", 0.1)
    assert result.exit_code == 0, result.output
    for method in ("dense", "masked", "sparse"):
        assert len(re.findall(rf"^ *{method} +0\.\d{{4}} ", result.output, re.MULTILINE)) == 1
    assert "best possible" in result.output
    assert "most popular" in result.output
    assert len(re.findall(r"^  \d\. i\d{4}", result.output, re.MULTILINE)) == 5
    assert call("recommend", out, "--user", "u0003").exit_code == 0


@pytest.mark.parametrize("model", ["multvae", "lightgcn"])
def test_quickstart_rows_hold_together(make_config, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make_config("dsl", "train.epochs=3", model=model)
    with (tmp_path / "table.txt").open("w") as file:
        rows = run_quickstart(config, quiet=True, timing_seconds=0.05, console=Console(file=file, width=80))
    dense, masked, sparse = rows
    assert [row.name for row in rows] == ["dense", "masked", "sparse"]
    assert masked.weights == dense.weights
    assert sparse.weights == pytest.approx(0.4 * dense.weights, rel=1e-3)
    assert masked.resident > dense.resident > sparse.resident
    # The simulation saves no work; ours does less, and explores.
    assert masked.total_macs == dense.total_macs
    assert dense.macs["exploration"] == 0 < sparse.macs["exploration"]
    assert sparse.macs["forward"] < dense.macs["forward"]
    assert all(row.step_ms > 0 and row.recommend_ms > 0 for row in rows)
    text = (tmp_path / "table.txt").read_text()
    assert "…" not in text  # nothing is cut off in 80 columns
    assert [path.name for path in tmp_path.iterdir()] == ["table.txt"]


def test_verdict_says_where_sparse_loses():
    macs = {"forward": 4.0, "backward": 8.0, "exploration": 0.0}
    dense = Row("dense", 0.3, 0.2, 100, 1600, macs, 1.0, 0.5, 10.0)
    sparse = Row("sparse", 0.299, 0.1, 25, 500, {**macs, "forward": 1.0}, 2.0, 0.4, 10.0)
    (line,) = verdict([dense, sparse], 20)
    better, equal, worse = line.removeprefix("Sparse against dense: ").split("; ")
    assert better == "better: bytes in training 0.31x, MACs per step 0.75x, time per recommendation 0.80x"
    assert equal == "equal within 1 %: Recall@20 1.00x, time of training with compilation 1.00x"
    assert worse == "worse: NDCG@20 0.50x, time per step 2.00x."


@pytest.mark.real
@pytest.mark.slow
def test_quickstart_on_real_data(real_data):
    arguments = ["--dataset", "ml-100k", "--data-dir", real_data, "--set", "train.epochs=3", "--timing", 0.5]
    result = call("quickstart", *arguments, "--quiet")
    assert result.exit_code == 0, result.output
    assert "ml-100k: 943 users" in result.output
    assert "best possible" not in result.output


def test_a_real_ctrl_c_in_the_middle_of_an_epoch(tmp_path):
    """A process of its own gets SIGINT while it trains; what is on disk then continues to the same end."""
    arguments = ["train", *map(str, SMALL), "--epochs", "400", "--set", "train.patience=0"]
    command = [
        sys.executable,
        "-c",
        "from recsys.cli import main; main()",
        *arguments,
        "-o",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    for _ in range(1200):
        if log.exists() and len(log.read_text().splitlines()) >= 3:
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "train --resume" in stderr
    done = len(log.read_text().splitlines())
    assert 3 <= done < 400
    folder = RunFolder.open(tmp_path / "run")
    trainer = Trainer(folder.config(), session.load_dataset(folder.config()))
    trainer.load_state_dict(folder.load_checkpoint())
    assert trainer.epoch in (done, done - 1)
    assert trainer.resident["gradients"] > 0
